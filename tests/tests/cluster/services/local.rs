//! `externalTrafficPolicy: Local`: the address goes where a pod is ready.

use std::{net::SocketAddr, time::Duration};

use anyhow::ensure;
use lab::product;

use super::scene::{LEAVING, READY, Scene};
use crate::{SOON, answered, check, installed};

/// Between two requests of an impatient client.
const EVERY: Duration = Duration::from_millis(50);
/// What breaks a request that is under way to the former owner: the new one does not know it.
const BROKEN: &str = "connection reset";

#[test]
fn an_owner_whose_last_pod_ends_hands_over_before_clients_notice() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let lab = scene.lab;
        let spec = "type: LoadBalancer, externalTrafficPolicy: Local, ports: [{name: http, port: 80}]";
        scene.service("leaving", spec)?;
        let pods = [("a", 8080), ("b", 9080)];
        for (pod, port) in pods {
            scene.slice("leaving", pod, port, &[(pod, READY)])?;
        }
        let vip = scene.expose("leaving", &[])?;
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        let (ends, stays) = if owner.number == 1 { (pods[0], pods[1]) } else { (pods[1], pods[0]) };
        let client = lab.client().limit(Duration::from_secs(10));
        let stays_at = SocketAddr::new(scene.pod(stays.0, false)?, stays.1);
        let watch = client.watch(&format!("http://{vip}/hostname"), EVERY)?;
        let beside = client.watch(&format!("http://{stays_at}/hostname"), EVERY)?;
        watch.wait_answers(50, SOON)?;

        scene.slice("leaving", ends.0, ends.1, &[(ends.0, LEAVING)])?;
        let next = if owner.number == 1 { "node-2" } else { "node-1" };
        product::wait_status_owner(lab, vip, next, SOON)?;
        let now = product::wait_one_owner(lab, vip, SOON)?;
        ensure!(now.node == next, "from {} to {}", owner.node, now.node);
        scene.answer_to_client("http", (vip, 80), &[stays.0])?;
        watch.wait_answers(50, SOON)?;
        let (report, beside) = (watch.stop(), beside.stop());
        println!("from {} to {}: {report}", owner.node, now.node);
        answered(&report, &beside)?;
        ensure!(report.failures <= report.bearable(EVERY), "{report}");
        ensure!(report.by_failure.keys().all(|what| what == BROKEN), "{report}");

        // One that ends is better than none.
        scene.slice("leaving", stays.0, stays.1, &[(stays.0, LEAVING)])?;
        scene.programmed(vip, "True Programmed")?;
        std::thread::sleep(Duration::from_secs(2));
        product::wait_one_owner(lab, vip, SOON)?;
        lab.client().get(&format!("http://{vip}/hostname"))?;
        scene.remove("leaving")
    });
}
