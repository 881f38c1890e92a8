//! A mount whose daemon is killed, and a plain directory with the same content.

use std::path::{Path, PathBuf};

use cowl_tests::command::run;
use cowl_tests::killer::Killer;
use cowl_tests::mount::{Overlay, Stack, wait_until};
use cowl_tests::scratch::Scratch;

/// The time in milliseconds for which a daemon answers requests.
const LIFETIME: u64 = 300;
/// The number of kills after which a program is not repeated.
const KILLS: u32 = 5;
/// The number of kills with `COWL_UNDER_FIRE=1`.
const MANY_KILLS: u32 = 200;

/// A stack with content in its lower layer, and a plain directory with the same content.
pub(crate) struct Field {
    scratch: Scratch,
    stack: Stack,
}

impl Field {
    /// Creates a lower layer with what `fill` writes there.
    pub(crate) fn new(fill: impl FnOnce(&Path)) -> Field {
        let scratch = Scratch::for_test();
        // Some programs do not run as root.
        run("chmod", [Path::new("755"), &scratch]).ok();
        let lower = scratch.make("lower");
        fill(&lower);
        let upper = scratch.make("upper");
        let reference = format!("--reference={}", lower.display());
        for program in ["chown", "chmod"] {
            run(program, [reference.as_ref(), upper.as_os_str()]).ok();
        }
        let plain = scratch.make("plain");
        run("cp", [Path::new("-aT"), &lower, &plain]).ok();
        let stack = Stack {
            lowers: vec![lower],
            upper: Some((upper, scratch.make("work"))),
        };
        Field { scratch, stack }
    }

    /// Returns the plain directory.
    pub(crate) fn plain(&self) -> PathBuf {
        self.scratch.join("plain")
    }

    /// Returns the path of another file of the test.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Mounts the stack, and begins to kill its daemons.
    #[track_caller]
    pub(crate) fn attack(&self) -> Attack {
        let mount_point = self.scratch.make("mount");
        let overlay = Overlay::cowlfs(&self.stack, &mount_point, "dev,suid,keeper=on");
        let killer = Killer::start(overlay.path(), LIFETIME..=LIFETIME);
        Attack { overlay, killer }
    }

    /// Mounts the stack without a keeper.
    #[track_caller]
    pub(crate) fn mount(&self) -> Overlay {
        Overlay::cowlfs(&self.stack, &self.scratch.make("mount"), "dev,suid")
    }

    /// Runs `work` in the plain directory, and on the mount until enough daemons have been killed. Its argument is the
    /// number of the round, and each of its results must be that of the plain directory.
    #[track_caller]
    pub(crate) fn compare(&self, work: impl Fn(&Path, u32) -> String) {
        let attack = self.attack();
        let mut round = 0;
        while round == 0 || attack.continues() {
            round += 1;
            let plain = work(&self.plain(), round);
            let mounted = work(attack.path(), round);
            assert_eq!(mounted, plain, "round {round}");
        }
        attack.end();
    }
}

/// A mount whose daemons are killed.
pub(crate) struct Attack {
    overlay: Overlay,
    killer: Killer,
}

impl Attack {
    /// Returns the mount point.
    pub(crate) fn path(&self) -> &Path {
        self.overlay.path()
    }

    /// Returns whether more daemons are to be killed.
    pub(crate) fn continues(&self) -> bool {
        let many = std::env::var_os("COWL_UNDER_FIRE").is_some();
        self.killer.kills() < if many { MANY_KILLS } else { KILLS }
    }

    /// Stops, and unmounts the file system normally. Nothing may be left of interrupted changes.
    #[track_caller]
    pub(crate) fn end(self) {
        let kills = self.killer.stop();
        eprintln!("{kills} kills");
        assert!(kills >= KILLS, "{kills} kills");
        wait_until("another daemon", || {
            self.overlay.pid() != self.overlay.program()
        });
        let work = self.overlay.path().with_file_name("work").join("work");
        self.overlay.unmount();
        let left: Vec<_> = std::fs::read_dir(work)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| !name.as_encoded_bytes().starts_with(b"#"))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}
