//! A registry of container images: `docker-registry` on a free port of this machine, or in a network namespace, with its
//! data in a directory of the test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::sh_in;
use crate::conditions::Need;
use crate::hosts::Host;

/// Requirements of every test with a registry.
pub const NEEDS: &[Need] = &[Need::Program("docker-registry"), Need::Program("openssl")];

/// The name of the user of a registry with passwords.
pub const USER: &str = "u";

/// The password of this user.
pub const PASSWORD: &str = "p:w d";

/// The password as bcrypt.
const HASH: &str = "$2b$05$abcdefghijklmnopqrstuu68koelPJZ8G7JJCNPHHOneOfiitfpmu";

/// The time until a registry must listen.
const START: Duration = Duration::from_secs(60);

/// The protection of a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Protection {
    /// Whether it requires a password.
    pub password: bool,
    /// Whether it uses TLS, with a certificate of its own authority.
    pub tls: bool,
    /// Whether it requires a certificate of this authority from clients. Only with TLS.
    pub clients: bool,
}

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    dir: PathBuf,
    name: String,
}

impl Registry {
    /// Starts a registry on this machine with its data in `dir`.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start(dir: &Path, protection: Protection) -> Self {
        let address = ("127.0.0.1", free_port());
        Self::start_at(dir, protection, address, Command::new("docker-registry"))
    }

    /// Starts a registry in a network namespace of [`crate::hosts`].
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start_on(host: &Host, dir: &Path, protection: Protection) -> Self {
        let address = (host.address(), 5000);
        Self::start_at(dir, protection, address, host.command("docker-registry"))
    }

    /// Starts a registry at an address, with a command line that runs `docker-registry` where this address exists.
    ///
    /// # Panics
    /// If it does not start.
    #[must_use]
    pub fn start_at(
        dir: &Path,
        protection: Protection,
        (host, port): (&str, u16),
        mut command: Command,
    ) -> Self {
        std::fs::create_dir_all(dir.join("certs")).expect("a directory");
        let mut config = format!(
            "version: 0.1\nlog: {{ level: info }}\nstorage: {{ filesystem: {{ rootdirectory: {}/data }} }}\n\
             http:\n  addr: {host}:{port}\n",
            dir.display()
        );
        if protection.tls {
            sh_in(dir, &CERTIFICATES.replace("ADDRESS", host)).ok();
            config.push_str(&format!(
                "  tls:\n    certificate: {0}/server.pem\n    key: {0}/server.key\n",
                dir.display()
            ));
            if protection.clients {
                let authority = dir.join("certs/ca.crt");
                config.push_str(&format!("    clientcas: [ {} ]\n", authority.display()));
                sh_in(dir, CLIENT).ok();
            }
        }
        if protection.password {
            let file = dir.join("htpasswd");
            std::fs::write(&file, format!("{USER}:{HASH}\n")).expect("the file of passwords");
            config.push_str(&format!(
                "auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n",
                file.display()
            ));
        }
        std::fs::write(dir.join("config.yml"), config).expect("the config");
        let log = std::fs::File::create(dir.join("log")).expect("the log");
        let child = command
            .arg("serve")
            .arg(dir.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log"))
            .stderr(log)
            .spawn()
            .expect("docker-registry");
        let registry = Self {
            child,
            dir: dir.to_owned(),
            name: format!("{host}:{port}"),
        };
        let begin = Instant::now();
        while !registry.log().contains("listening on") {
            assert!(begin.elapsed() < START, "no registry: {}", registry.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    /// Returns the host and the port.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Returns the directory with the certificate of its authority, and with that of the client.
    #[must_use]
    pub fn cert_dir(&self) -> PathBuf {
        self.dir.join("certs")
    }

    /// Returns the number of requests with this method so far.
    #[must_use]
    pub fn count(&self, method: &str) -> usize {
        let quoted = format!("] \"{method} /v2/");
        let log = self.log();
        log.lines().filter(|line| line.contains(&quoted)).count()
    }

    /// Returns the log.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).expect("the log")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("cannot end the registry: {error}");
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// Creates an authority, and a certificate of the server.
const CERTIFICATES: &str = r#"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=test authority" \
    -keyout ca.key -out certs/ca.crt
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=registry" \
    -keyout server.key -out server.csr
printf 'subjectAltName=IP:ADDRESS,DNS:localhost\nbasicConstraints=CA:FALSE\n' > ext
openssl x509 -req -in server.csr -CA certs/ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem
"#;

/// Creates a certificate of a client.
const CLIENT: &str = r#"
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=client" \
    -keyout certs/client.key -out client.csr
printf 'basicConstraints=CA:FALSE\n' > client.ext
openssl x509 -req -in client.csr -CA certs/ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile client.ext \
    -out certs/client.cert
"#;
