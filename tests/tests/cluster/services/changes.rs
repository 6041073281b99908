//! What changes about a Service, and several Services and addresses that have to do with each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::ensure;
use lab::product;

use super::scene::{KINDS, Scene};
use crate::{SOON, check, installed};

const BOTH: [(&str, u16); 2] = [("a", 8080), ("b", 9080)];

#[test]
fn what_changes_about_a_service_is_followed() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let lab = scene.lab;
        let web = "selector: {tier: both}, ports: [{port: 80, targetPort: http}]";
        scene.service("changing", web)?;
        let vip = scene.expose("changing", &[])?;
        scene.table(vip, "TCP :80 wlc", &BOTH)?;

        // Its port gets another number.
        scene.service("changing", "selector: {tier: both}, ports: [{port: 8000, targetPort: http}]")?;
        scene.table(vip, "TCP :8000 wlc", &BOTH)?;
        scene.answer("http", (vip, 8000), &["a", "b"])?;
        scene.refuses((vip, 80))?;

        // It is deleted, and made again.
        lab.kubectl(["delete", "service", "changing", "-n", KINDS])?.ok()?;
        scene.programmed(vip, "False ServiceNotFound")?;
        scene.refuses((vip, 8000))?;
        scene.service("changing", web)?;
        scene.programmed(vip, "True Programmed")?;
        scene.table(vip, "TCP :80 wlc", &BOTH)?;
        scene.answer("http", (vip, 80), &["a", "b"])?;

        // A second address for it.
        let second: Ipv4Addr = "10.87.2.250".parse()?;
        scene.reserve(second, 155, &["changing"])?;
        scene.table(second, "TCP :80 wlc", &BOTH)?;
        product::wait_one_owner(lab, second, SOON)?;
        scene.answer("http", (second, 80), &["a", "b"])?;
        scene.answer("http", (vip, 80), &["a", "b"])?;

        // A Service that wants the same port there.
        scene.service(
            "rival",
            "selector: {app: a}, ports: [{name: http, port: 80, targetPort: http},\
             {name: more, port: 81, targetPort: http}]",
        )?;
        scene.reserve(second, 155, &["changing", "rival"])?;
        scene.programmed(second, "False PortClash")?;
        scene.table(second, "TCP :80 wlc", &BOTH)?;
        scene.table(second, "TCP :81 wlc", &[("a", 8080)])?;
        lab.kubectl(["delete", "virtualip", &second.to_string()])?.ok()?;
        lab.kubectl(["delete", "service", "rival", "-n", KINDS])?.ok()?;
        scene.remove("changing")
    });
}

#[test]
fn dns_over_tcp_and_over_udp_share_an_address() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        scene.service("dns-tcp", "selector: {app: a}, ports: [{port: 53, targetPort: http}]")?;
        scene
            .service("dns-udp", "selector: {app: b}, ports: [{port: 53, targetPort: udp, protocol: UDP}]")?;
        let dns = scene.expose("dns-tcp", &[])?;
        let same = scene.expose("dns-udp", &["--share", "--ip", &dns.to_string()])?;
        ensure!(same == dns, "{same} is not {dns}");
        scene.table(dns, "TCP :53 wlc", &[("a", 8080)])?;
        scene.table(dns, "UDP :53 wlc", &[("b", 9081)])?;
        scene.answer("http", (dns, 53), &["a"])?;
        scene.answer("udp", (dns, 53), &["b"])?;
        scene.remove("dns-udp")?;
        scene.remove("dns-tcp")
    });
}

#[test]
fn each_address_of_a_service_of_both_families_has_the_endpoints_of_its_own() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let spec =
            "ipFamilyPolicy: RequireDualStack, selector: {tier: both}, ports: [{port: 80, targetPort: http}]";
        scene.service("dual", spec)?;
        scene.expose("dual", &[])?;
        let four: Ipv4Addr = product::address_of(scene.lab, KINDS, "dual")?;
        let six: Ipv6Addr = product::address_of(scene.lab, KINDS, "dual")?;
        for vip in [IpAddr::from(four), six.into()] {
            scene.table(vip, "TCP :80 wlc", &BOTH)?;
            product::wait_one_owner(scene.lab, vip, SOON)?;
            scene.answer("http", (vip, 80), &["a", "b"])?;
        }
        scene.remove("dual")
    });
}

#[test]
fn a_service_that_no_address_could_serve_is_refused_in_words() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let rows = [
            (
                "elsewhere",
                "type: ExternalName, externalName: example.org",
                ["; ExternalName is not supported", "is an ExternalName"],
            ),
            ("portless", "clusterIP: None, selector: {app: a}", ["has no ports: ", "has no ports that "]),
        ];
        for ((name, spec, [said, shown]), number) in rows.into_iter().zip(1..) {
            scene.service(name, spec)?;
            let refused = scene.lab.kubectl(["vip", "expose", &format!("svc/{name}"), "-n", KINDS])?;
            ensure!(!refused.success() && refused.stderr.contains(said), "{refused:?}");
            // Who writes the VirtualIP by hand is told by its status.
            let vip = Ipv4Addr::new(10, 87, 2, 250 + number);
            scene.reserve(vip, 155 + number, &[name])?;
            let told =
                product::wait_condition(scene.lab, vip, "Programmed", "False ServiceNotSupported", SOON)?;
            ensure!(told.contains(shown), "{told}");
            scene.remove(name)?;
        }
        Ok(())
    });
}
