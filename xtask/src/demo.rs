//! Runs every main operation on a Debian root filesystem and prints each command line. The final check is independent
//! of cowl: GNU tar's digest of the restored tree must equal the digest that was taken before the damage.

use std::path::{Path, PathBuf};

use cowl_tests::rootfs::{self, Kind};
use cowl_tests::scratch::Scratch;

use crate::run::{Result, Run, failure, note, target, title};

/// Options of `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Use a busybox root filesystem even if Debian is available
    #[arg(long)]
    busybox: bool,
}

/// One run of the demo.
struct Demo {
    cowl: PathBuf,
    cowlfs: PathBuf,
    scratch: Scratch,
    kind: Kind,
}

/// Runs the demo, and prints the daemons' logs if it fails.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::setup::run_for_demo()?;
    title("build");
    Run::cargo()?
        .args([
            "build",
            "--profile",
            "demo",
            "--locked",
            "--bins",
            "-p",
            "cowl",
            "-p",
            "cowlfs",
        ])
        .run()?;

    title("a root filesystem");
    let (tar, kind) = root_filesystem(options.busybox)?;
    note(&format!("{kind:?}: {}", tar.display()));

    let scratch = Scratch::new("demo");
    let demo = Demo {
        cowl: target()?.join("demo/cowl"),
        cowlfs: target()?.join("demo/cowlfs"),
        scratch,
        kind,
    };
    let result = demo.run_all(&tar);
    if result.is_err() {
        demo.print_logs();
    }
    result
}

fn root_filesystem(busybox: bool) -> Result<(PathBuf, Kind)> {
    if !busybox {
        note("mmdebstrap --variant=minbase bookworm (cached after the first run)");
        match rootfs::debian_tar() {
            Ok(tar) => return Ok((tar, Kind::Debian)),
            Err(error) => note(&format!(
                "!! cannot obtain Debian, so this demo uses a busybox tree and installs no \
                 package: {error}"
            )),
        }
    }
    Ok((rootfs::busybox_tar()?, Kind::Busybox))
}

impl Demo {
    fn run_all(&self, tar: &Path) -> Result<()> {
        title("create and mount");
        self.cowl(["create", "web", "--from"]).arg(tar).run()?;
        let mount = PathBuf::from(self.cowl(["mount", "web"]).output()?);
        note(&mount.display().to_string());
        self.exec(
            "web",
            "head -n 2 /etc/os-release 2>/dev/null || busybox | head -n 1",
        )?;
        self.changes_before(&mount)?;

        title("digest of the tree, by GNU tar");
        let before = digest(&mount)?;
        note(&format!("digest before: {before}"));

        title("snapshot");
        self.cowl(["snapshot", "web", "-m", "before the upgrade"])
            .run()?;

        title("damage");
        self.damage(&mount)?;
        let damaged = digest(&mount)?;
        note(&format!("digest after the damage: {damaged}"));
        if damaged == before {
            return failure("the damage did not change the tree, so the demo proves nothing");
        }
        self.cowl(["list"]).run()?;
        self.cowl(["list", "web"]).run()?;
        self.diff()?;

        title("restore under the same name");
        self.cowl(["restore", "web", "snap0"]).run()?;
        self.cowl(["list", "web"]).run()?;
        self.cowl(["status", "web"]).run()?;
        // A mounted container is mounted again at the same path.
        let restored = digest(Path::new(&self.cowl(["mount", "web"]).output()?))?;
        note(&format!("digest of the restored tree: {restored}"));
        expect_same("web, restored", &restored, &before)?;
        self.exec("web", "ls /usr/bin | wc -l")?;

        title("restore to a new name, clone");
        self.cowl(["restore", "web", "snap0", "web2"]).run()?;
        self.cowl(["clone", "web@snap0", "web3"]).run()?;
        for name in ["web2", "web3"] {
            let mount = self.cowl(["mount", name]).output()?;
            expect_same(name, &digest(Path::new(&mount))?, &before)?;
            self.cowl(["umount", name]).run()?;
        }

        title("flatten");
        self.exec("web3", "echo one > /root/one")?;
        self.cowl(["snapshot", "web3", "-m", "one"]).run()?;
        self.exec("web3", "echo two > /root/two; rm /root/one")?;
        self.cowl(["snapshot", "web3", "-m", "two"]).run()?;
        self.cowl(["flatten", "web3"]).run()?;
        self.exec("web3", "cat /root/two; test ! -e /root/one")?;

        self.export_and_unpack(&before)?;
        self.overlay_alone()?;

        title("take down");
        self.cowl(["umount", "web"]).run()?;
        for name in ["web", "web2", "web3"] {
            self.cowl(["destroy", name, "--yes"]).run()?;
        }
        self.cowl(["list"]).run()?;

        title("proof");
        note(&format!("before the damage:  {before}"));
        note(&format!("after the damage:   {damaged}"));
        note(&format!("after the restore:  {restored}"));
        note("the restored tree is identical to the tree before the damage");
        Ok(())
    }

    /// Creates links, xattrs, ACLs, capabilities and special files, so that the comparison covers more than plain
    /// files.
    fn changes_before(&self, mount: &Path) -> Result<()> {
        let root = mount.display();
        Run::shell(&format!(
            "cd '{root}'/root && echo one > linked && ln linked alias && truncate -s 1M sparse && \
             setfattr -n user.note -v kept linked && setfacl -m u:1000:r linked && mkfifo fifo && \
             cp linked able && setcap cap_net_bind_service=ep able && mknod null c 1 3"
        ))
        .run()
    }

    fn damage(&self, mount: &Path) -> Result<()> {
        if self.kind == Kind::Debian {
            self.exec(
                "web",
                "dpkg -i /root/debs/*.deb && hello && less --version | head -n 1",
            )?;
            self.exec("web", "apt-get purge -y -qq hello")?;
        }
        self.exec(
            "web",
            "echo 'edited by mistake' >> /etc/passwd; rm -f /etc/hostname /etc/motd",
        )?;
        // A busybox tree lacks some of these directories.
        self.exec(
            "web",
            "for dir in /var/lib /usr/share; do if [ -d $dir ]; then mv $dir $dir.away; fi; done",
        )?;
        self.exec(
            "web",
            "chown -R 1000:1000 /root; chmod 0 /root/linked; echo two >> /root/alias",
        )?;
        Run::shell(&format!("rm -rf '{}/usr/bin'", mount.display())).run()
    }

    fn diff(&self) -> Result<()> {
        let diff = self.cowl(["diff", "web@snap0", "web"]).output()?;
        let lines: Vec<_> = diff.lines().collect();
        for line in lines.iter().take(12) {
            note(line);
        }
        note(&format!("... {} lines", lines.len()));
        if lines.is_empty() {
            return failure("diff does not see the damage");
        }
        Ok(())
    }

    fn export_and_unpack(&self, before: &str) -> Result<()> {
        title("export, and unpack with GNU tar");
        let file = self.scratch.join("web.tar.zst");
        self.cowl(["export", "web@snap0"]).arg(&file).run()?;
        let unpacked = self.scratch.make("unpacked");
        Run::shell(&format!(
            "tar --zstd --numeric-owner --acls --xattrs --xattrs-include='*' -xpf '{}' -C '{}'",
            file.display(),
            unpacked.display()
        ))
        .run()?;
        expect_same("the unpacked export", &digest(&unpacked)?, before)
    }

    fn overlay_alone(&self) -> Result<()> {
        title("cowlfs alone, with fuse-overlayfs's command line");
        let [lower, upper, work, mount] = ["a", "u", "w", "m"].map(|name| self.scratch.make(name));
        std::fs::write(lower.join("file"), "from below\n")?;
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        Run::new(&self.cowlfs)
            .args(["-o", &options])
            .arg(&mount)
            .run()?;
        Run::shell(&format!(
            "cd '{}' && cat file && echo changed >> file && rm -f nothing && cat '{}' && ls -l '{}'",
            mount.display(),
            lower.join("file").display(),
            upper.display()
        ))
        .run()?;
        Run::new("umount").arg(&mount).run()
    }

    fn cowl<const N: usize>(&self, words: [&str; N]) -> Run {
        Run::new(&self.cowl)
            .arg("--store")
            .arg(self.scratch.join("store"))
            .args(words)
    }

    fn exec(&self, name: &str, line: &str) -> Result<()> {
        self.cowl(["exec", name, "--", "sh", "-ec", line])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .run()
    }

    /// Prints the daemons' logs after a failure, before the scratch directory is removed.
    fn print_logs(&self) {
        let logs = format!(
            "s='{}'/store; tail -n 20 /run/cowl/*-$(stat -c %D-%i \"$s\")/*/log \"$s\"/run/*/log",
            self.scratch.display()
        );
        if let Err(problem) = Run::shell(&logs).run() {
            note(&format!("cannot print the logs: {problem}"));
        }
    }
}

/// Returns the SHA-256 digest of GNU tar's archive of a tree, with sorted names.
fn digest(tree: &Path) -> Result<String> {
    let line = format!(
        "tar -C '{}' --sort=name --numeric-owner --acls --xattrs --xattrs-include='*' --format=posix \
         --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime -cf - . | sha256sum",
        tree.display()
    );
    let output = Run::shell(&line).output()?;
    output
        .split_whitespace()
        .next()
        .map(str::to_owned)
        .ok_or_else(|| crate::run::Failure("sha256sum printed nothing".to_owned()))
}

fn expect_same(subject: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        note(&format!("{subject}: same digest"));
        return Ok(());
    }
    failure(format!("{subject}: digest {found}, expected {expected}"))
}
