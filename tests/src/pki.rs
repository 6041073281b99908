//! The certificates of a cluster and the kubeconfigs that carry them.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};

/// A certificate authority that writes into one folder.
pub(crate) struct Authority<'a> {
    folder: &'a Path,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, both as PEM.
pub(crate) struct Identity {
    certificate: String,
    key: String,
}

impl<'a> Authority<'a> {
    /// A new authority; writes `ca.crt`.
    pub(crate) fn create(folder: &'a Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = subject("lab", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        fs::write(folder.join("ca.crt"), &certificate)?;
        Ok(Self { folder, certificate, issuer: Issuer::new(params, key) })
    }

    /// Signs a certificate for a user (and a group), or for a server with those names and addresses.
    pub(crate) fn sign(&self, user: &str, group: Option<&str>, names: &[String]) -> Result<Identity> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = subject(user, group);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }

    /// Writes `NAME.crt` and `NAME.key`.
    pub(crate) fn write(&self, name: &str, identity: &Identity) -> Result<()> {
        fs::write(self.folder.join(format!("{name}.crt")), &identity.certificate)?;
        fs::write(self.folder.join(format!("{name}.key")), &identity.key)?;
        Ok(())
    }

    /// A kubeconfig for that identity. JSON is YAML too.
    pub(crate) fn kubeconfig(&self, server: &str, identity: &Identity) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {
                "server": server,
                "certificate-authority-data": STANDARD.encode(&self.certificate),
            }}],
            "users": [{"name": "lab", "user": {
                "client-certificate-data": STANDARD.encode(&identity.certificate),
                "client-key-data": STANDARD.encode(&identity.key),
            }}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        })
    }

    /// Writes the key pair that signs the tokens of service accounts: `sa.key`, `sa.pub`.
    pub(crate) fn write_token_keys(&self) -> Result<()> {
        let key = KeyPair::generate()?;
        fs::write(self.folder.join("sa.key"), key.serialize_pem())?;
        fs::write(self.folder.join("sa.pub"), key.public_key_pem())?;
        Ok(())
    }
}

fn subject(user: &str, group: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    name.push(DnType::CommonName, user);
    name
}
