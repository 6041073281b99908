//! The lab itself: that its handles do what they say. What these tests break they mend.

use std::{net::Ipv4Addr, time::Duration};

use anyhow::ensure;

use super::{SOON, check, check_alone};

#[test]
fn commands_on_nodes_have_an_exit_code_and_two_outputs() {
    check(|| {
        let lab = lab::cluster()?;
        for node in lab.nodes() {
            let output = node.exec("hostname; ip -4 -oneline address show eth0; echo oops >&2; exit 7")?;
            ensure!(output.code == 7 && output.stderr.trim() == "oops", "{output:?}");
            ensure!(
                output.stdout.contains(&node.name()) && output.stdout.contains(&node.address().to_string()),
                "{output:?}"
            );
        }
        let modules = lab.vm().exec("grep -c ip_vs /proc/modules")?.ok()?;
        ensure!(modules.text() != "0");
        Ok(())
    });
}

#[test]
fn a_node_that_is_unplugged_is_silent_and_comes_back() {
    check_alone(|| {
        let lab = lab::cluster()?;
        let node = lab.node(3);
        let owners = || lab.arp_owner(node.address(), Duration::from_millis(500));
        ensure!(owners()? == [node.mac()], "{:?}", owners()?);
        ensure!(lab.node_of_mac(&node.mac()) == Some(3));
        lab.unplug(3)?;
        let silent = owners();
        lab.plug(3)?;
        ensure!(silent?.is_empty());
        lab::command::until("node-3's answer", SOON, || Ok((owners()? == [node.mac()]).then_some(())))
    });
}

#[test]
fn the_lan_has_no_owner_of_a_free_address() {
    check(|| {
        let owners = lab::cluster()?.arp_owner(Ipv4Addr::new(10, 87, 99, 99), Duration::from_millis(300))?;
        ensure!(owners.is_empty(), "{owners:?}");
        Ok(())
    });
}

#[test]
fn the_client_sees_what_answers_and_what_is_refused() {
    check(|| {
        let lab = lab::cluster()?;
        let node = lab.node(1);
        // The kubelet's port wants TLS, and says so to plain HTTP.
        let answer = lab.client().get(&format!("http://{}:10250/", node.address()))?;
        ensure!(answer.status == 400 && answer.source.ip() == Ipv4Addr::new(10, 87, 0, 1), "{answer:?}");
        ensure!(lab.client().tcp_refused((node.address(), 2).into())?);
        ensure!(!lab.client().tcp_refused((node.address(), 10250).into())?);
        Ok(())
    });
}
