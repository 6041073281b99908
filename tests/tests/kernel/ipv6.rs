//! Virtual services of IPv6: as `ipvsadm` shows them, beside those of IPv4, and on a node that does not forward IPv6.

use std::net::Ipv6Addr;

use super::*;

const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x50);
const FORWARDING: &str = "net.ipv6.conf.all.forwarding";

fn key6(port: u16) -> ServiceKey {
    ServiceKey { address: VIP6.into(), ..key(port) }
}

fn pod6(n: u16) -> SocketAddr {
    SocketAddr::from(([0xfd10, 0x244, 1, 0, 0, 0, 0, n], 8080))
}

fn service6(pods: impl IntoIterator<Item = u16>) -> VirtualService {
    let destinations = pods.into_iter().map(|n| (pod6(n), 1)).collect();
    VirtualService { settings: Settings::new(Scheduler::Wlc, None), destinations }
}

fn forward(value: u8) {
    run(&format!("sysctl -qw {FORWARDING}={value}"));
}

#[test]
fn services_come_change_and_go() {
    isolated(|| {
        forward(1);
        let mut kernel = kernel();
        let mut wanted = desired([(key6(80), service6([1, 2])), (key(80), service([1]))]);
        assert_eq!(converge(&mut kernel, &wanted).len(), 2 + 2 + 2 + 3);
        assert_eq!(
            ipvsadm(),
            [
                "-A -t 10.87.2.50:80 -s wlc",
                "-A -t [fd87::2:50]:80 -s wlc",
                "-a -t 10.87.2.50:80 -r 10.244.1.1:8080 -m -w 1",
                "-a -t [fd87::2:50]:80 -r [fd10:244:1::1]:8080 -m -w 1",
                "-a -t [fd87::2:50]:80 -r [fd10:244:1::2]:8080 -m -w 1",
            ]
        );
        assert_eq!(kernel.observe().unwrap(), wanted);
        assert_eq!(self::kernel().observe().unwrap(), wanted, "the next process finds the same");

        wanted.services.insert(key6(80), service6([2, 3]));
        let expected =
            [Change::AddDestination(key6(80), pod6(3), 1), Change::DeleteDestination(key6(80), pod6(1))];
        assert_eq!(converge(&mut kernel, &wanted), expected);
        let settings = Settings::new(Scheduler::Rr, Some(600));
        let changed = wanted.services.get_mut(&key6(80)).unwrap();
        changed.settings = settings.clone();
        changed.destinations.insert(pod6(2), 0);
        let expected = [Change::SetService(key6(80), settings), Change::SetDestination(key6(80), pod6(2), 0)];
        assert_eq!(converge(&mut kernel, &wanted), expected);
        // Without a netmask: persistence is for each client, not for a network.
        assert!(ipvsadm().contains(&"-A -t [fd87::2:50]:80 -s rr -p 600".to_owned()), "{:?}", ipvsadm());
        assert_eq!(kernel.observe().unwrap(), wanted);

        assert_eq!(kernel.sentinel(&key6(80)), Ok(Sight::Both));
        run("ipvsadm -D -t [fd87::2:50]:80");
        assert_eq!(kernel.sentinel(&key6(80)), Ok(Sight::Table));
        assert_eq!(converge(&mut kernel, &wanted).len(), 3);
        let left = desired([(key(80), service([1]))]);
        converge(&mut kernel, &left);
        assert_eq!(kernel.observe().unwrap(), left);
        assert_eq!(ipvsadm().len(), 2);
    });
}

#[test]
fn a_foreign_service_is_left_alone() {
    isolated(|| {
        forward(1);
        run("ipvsadm -A -t [fd87::2:50]:443 -s sh");
        run("ipvsadm -a -t [fd87::2:50]:443 -r [fd10:244:1::9]:443 -m -w 7");
        let before = ipvsadm();
        let mut kernel = kernel();
        let wanted = desired([(key6(80), service6([1])), (key6(443), service6([1]))]);
        let Plan { changes, conflicts } = plan(&wanted, &kernel.observe().unwrap());
        assert_eq!(conflicts, [key6(443)]);
        assert_eq!(kernel.apply(&changes), vec![]);
        assert!(before.iter().all(|line| ipvsadm().contains(line)));
        kernel.remove_everything().unwrap();
        assert_eq!(ipvsadm(), before);
    });
}

/// Forwarding is not ours to switch on: the node could lose its default route.
#[test]
fn a_node_that_does_not_forward_says_so_and_serves_ipv4() {
    isolated(|| {
        forward(0);
        let mut kernel = kernel();
        let wanted = desired([(key6(80), service6([1])), (key(80), service([1]))]);
        // At first, and at every later look.
        for at_first in [true, false] {
            let changes = plan(&wanted, &kernel.observe().unwrap()).changes;
            let failed = kernel.apply(&changes);
            assert_eq!(failed.len(), 1, "{failed:?}");
            let (index, error) = &failed[0];
            let settings = service6([]).settings;
            let expected = match at_first {
                true => Change::AddService(key6(80), settings),
                false => Change::SetService(key6(80), settings),
            };
            assert_eq!(changes[*index], expected);
            assert_eq!(error.reason(), Reason::SysctlNotSet);
            let command = "run `sysctl -w net.ipv6.conf.all.forwarding=1`";
            assert!(error.to_string().contains(command), "{error}");
        }
        assert_eq!(ipvsadm().len(), 4, "nothing is missing once it forwards");
        assert_eq!(run(&format!("sysctl -n {FORWARDING}")).trim(), "0");
        // Services of IPv4 need none of this.
        assert_eq!(
            plan(&desired([(key(80), service([1]))]), &kernel.observe().unwrap()).changes[0..1],
            [Change::DeleteService(key6(80))]
        );

        forward(1);
        assert_eq!(converge(&mut kernel, &wanted), []);
        forward(0);
        assert_eq!(plan(&wanted, &kernel.observe().unwrap()).changes.len(), 1);
        converge(&mut kernel, &desired([(key(80), service([1]))]));
        assert_eq!(ipvsadm().len(), 2);
    });
}
