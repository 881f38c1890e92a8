//! Two hosts with a network between them: network namespaces, connected by a pair of virtual devices.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command::{Output, run_command};
use crate::conditions::Need;

/// Requirements of every test with two hosts.
pub const NEEDS: &[Need] = &[Need::Root, Need::Program("ip"), Need::Program("nsenter")];

/// A host: a network namespace, which exists as long as this value.
#[derive(Debug)]
pub struct Host {
    /// The process that holds the namespace.
    holder: Child,
    device: &'static str,
    address: &'static str,
}

/// Creates two hosts that reach each other.
///
/// # Panics
/// If the kernel refuses.
#[must_use]
pub fn pair() -> (Host, Host) {
    let first = Host::new("left", "10.231.7.1");
    let second = Host::new("right", "10.231.7.2");
    let peer = second.holder.id().to_string();
    let link = ["link", "add", first.device, "type", "veth", "peer", "name"];
    let link = [&link[..], &[second.device, "netns", &peer]].concat();
    first.run("ip", &link).ok();
    for host in [&first, &second] {
        let address = format!("{}/24", host.address);
        host.run("ip", &["address", "add", &address, "dev", host.device])
            .ok();
        host.run("ip", &["link", "set", host.device, "up"]).ok();
        host.run("ip", &["link", "set", "lo", "up"]).ok();
    }
    (first, second)
}

impl Host {
    fn new(device: &'static str, address: &'static str) -> Self {
        let holder = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare");
        let host = Self {
            holder,
            device,
            address,
        };
        let own = std::fs::read_link("/proc/self/ns/net").expect("the own namespace");
        let begin = Instant::now();
        let path = format!("/proc/{}/ns/net", host.holder.id());
        while std::fs::read_link(&path).is_ok_and(|found| found == own) {
            assert!(begin.elapsed() < Duration::from_secs(60), "no namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
        host
    }

    /// Returns the address.
    #[must_use]
    pub fn address(&self) -> &str {
        self.address
    }

    /// Returns a command line that runs `program` on this host.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let pid = self.holder.id().to_string();
        command.args(["--target", &pid, "--net", "--", program]);
        command
    }

    /// Runs a command line on this host, with its environment.
    #[track_caller]
    #[must_use]
    pub fn run_command(&self, inner: &Command) -> Output {
        let program = inner.get_program().to_str().expect("the path of a program");
        let mut command = self.command(program);
        command.args(inner.get_args()).stdin(Stdio::null());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        run_command(command, b"")
    }

    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(args);
        run_command(command, b"")
    }

    /// Returns the number of bytes that this host has sent and received over the network so far.
    ///
    /// # Panics
    /// If `ip` does not report it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let args = ["-statistics", "-json", "link", "show", "dev", self.device];
        let found = self.run("ip", &args).ok().json();
        let stats = &found[0]["stats64"];
        let count = |way: &str| stats[way]["bytes"].as_u64();
        let both: Option<u64> = ["rx", "tx"].into_iter().map(count).sum();
        both.unwrap_or_else(|| panic!("no counters: {}", Value::to_string(&found)))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Err(error) = self.holder.kill().and_then(|()| self.holder.wait()) {
            eprintln!("cannot end a host: {error}");
        }
    }
}
