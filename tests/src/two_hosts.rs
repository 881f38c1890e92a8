//! Two network namespaces with a link between them, and an ssh server in the second one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::{Output, run, run_command, sh};
use crate::conditions::Need;
use crate::scratch::Scratch;

/// The programs that the hosts need.
pub const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Program("ip"),
    Need::Program("ssh"),
    Need::Program("ssh-keygen"),
    Need::Program("sshd"),
];

/// The address of the second host, which exists only in the two namespaces.
const SERVER: &str = "192.0.2.2";

/// The name of each end of the link.
const LINK: &str = "cowl0";

/// Two hosts that are connected by a link. Only the first one can start connections.
#[derive(Debug)]
pub struct TwoHosts {
    dir: Scratch,
    /// The part of the namespaces' names that is unique to this test.
    id: String,
    server: Option<Child>,
}

impl TwoHosts {
    /// Creates the namespaces and starts the ssh server.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start() -> TwoHosts {
        Self::start_with("")
    }

    /// Creates the namespaces and starts the ssh server, with more lines in its configuration.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn start_with(more: &str) -> TwoHosts {
        let dir = Scratch::for_test();
        let id = format!("{}", std::process::id());
        let keys = dir.make("keys");
        let mut hosts = TwoHosts {
            dir,
            id: id.clone(),
            server: None,
        };
        for name in ["host", "user"] {
            let file = keys.join(name);
            run(
                "ssh-keygen",
                [
                    "-q",
                    "-t",
                    "ed25519",
                    "-N",
                    "",
                    "-f",
                    file.to_str().unwrap(),
                ],
            )
            .ok();
        }
        sh(&format!(
            "ip netns add cowl-a-{id}; ip netns add cowl-b-{id}
             ip -n cowl-a-{id} link add {LINK} type veth peer name {LINK} netns cowl-b-{id}
             ip -n cowl-a-{id} address add 192.0.2.1/24 dev {LINK}
             ip -n cowl-b-{id} address add {SERVER}/24 dev {LINK}
             for host in a b; do ip -n cowl-$host-{id} link set {LINK} up; done
             mkdir -p /run/sshd"
        ))
        .ok();
        let public = fs::read_to_string(keys.join("host.pub")).unwrap();
        fs::write(keys.join("known"), format!("{SERVER} {public}")).unwrap();
        let config = format!(
            "ListenAddress {SERVER}\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n{more}",
            keys = keys.display()
        );
        fs::write(keys.join("config"), config).unwrap();
        let sshd = crate::programs::in_path("sshd").expect("sshd");
        let log = fs::File::create(keys.join("log")).unwrap();
        let server = in_namespace(&format!("cowl-b-{id}"))
            .arg(sshd)
            .args(["-D", "-e", "-f"])
            .arg(keys.join("config"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        hosts.server = Some(server);
        let start = Instant::now();
        while hosts.ssh_output("true").code != 0 {
            let log = fs::read_to_string(keys.join("log")).unwrap();
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "no ssh server: {log}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        hosts
    }

    /// Returns the words of a shell that run ssh in the first namespace.
    #[must_use]
    pub fn ssh(&self) -> String {
        let keys = self.keys();
        format!(
            "ip netns exec cowl-a-{} ssh -F none -i {keys}/user -o UserKnownHostsFile={keys}/known \
             -o StrictHostKeyChecking=yes -o BatchMode=yes",
            self.id,
            keys = keys.display()
        )
    }

    /// Returns the URL of a store on the second host.
    #[must_use]
    pub fn url(&self, store: &Path) -> String {
        format!("ssh://{SERVER}{}", store.display())
    }

    /// Returns the address of the second host, for ssh.
    #[must_use]
    pub fn server(&self) -> &'static str {
        SERVER
    }

    /// Returns a command line that runs `program` on the first host.
    #[must_use]
    pub fn near(&self, program: &str) -> Command {
        let mut command = in_namespace(&format!("cowl-a-{}", self.id));
        command.arg(program);
        command
    }

    /// Returns a command line that runs `program` on the second host.
    #[must_use]
    pub fn far(&self, program: &str) -> Command {
        let mut command = in_namespace(&format!("cowl-b-{}", self.id));
        command.arg(program);
        command
    }

    /// Runs a command line on the second host.
    #[must_use]
    pub fn ssh_output(&self, line: &str) -> Output {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("{} {SERVER} \"$@\"", self.ssh()),
            "ssh",
            line,
        ]);
        run_command(command, b"")
    }

    /// Returns the number of bytes that the first host has sent and received, with all headers.
    ///
    /// # Panics
    /// If the kernel has no counters.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let counters = format!("/sys/class/net/{LINK}/statistics");
        let mut command = in_namespace(&format!("cowl-a-{}", self.id));
        command.args([
            "cat",
            &format!("{counters}/tx_bytes"),
            &format!("{counters}/rx_bytes"),
        ]);
        let text = run_command(command, b"").ok().out();
        text.lines()
            .map(|line| line.parse::<u64>().expect("a number"))
            .sum()
    }

    fn keys(&self) -> PathBuf {
        self.dir.join("keys")
    }
}

fn in_namespace(name: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]);
    command
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            drop(server.kill());
            drop(server.wait());
        }
        for host in ["a", "b"] {
            run("ip", ["netns", "del", &format!("cowl-{host}-{}", self.id)]);
        }
    }
}
