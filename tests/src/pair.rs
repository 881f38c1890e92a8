//! Two trees that must stay equal under the same operations: a mounted stack of layers and a plain directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::command::{Output, run_command};
use crate::cowl::Store;
use crate::mount::{Overlay, Stack};
use crate::tree::{self, Compare, Tree};
use crate::{layers, layout};

/// Name of the container.
const NAME: &str = "c";
/// Timeout for closed files to be released.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Implementation of the tested tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// A container of cowl.
    Container,
    /// A stack that cowlfs mounts with these options.
    Cowlfs(&'static str),
    /// The kernel's overlayfs, to validate the test itself.
    Kernel,
    /// A plain directory, to validate the test itself.
    Plain,
}

impl Under {
    /// Returns whether cowlfs mounts the tree.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Under::Container | Under::Cowlfs(_))
    }
}

/// A snapshot, with the tree at that time.
#[derive(Debug)]
struct Snapshot {
    name: String,
    tree: Tree,
}

/// A mounted stack, and the plain directory that it must be equal to.
#[derive(Debug)]
pub struct Pair {
    /// Path of the mounted tree.
    pub tested: PathBuf,
    /// Path of the plain directory.
    pub plain: PathBuf,
    mounted: Option<Overlay>,
    under: Under,
    stack: Stack,
    /// The store, which is used for containers only. Its scratch directory contains all other files.
    store: Store,
    taken: Vec<Snapshot>,
    pushed: u32,
    /// Whether layers were merged since [`Pair::take_flattened`].
    flattened: bool,
    /// Held by commands on the container.
    exclusion: Arc<Mutex<()>>,
}

impl Pair {
    /// Creates a pair of a stack of `lowers` (topmost first) and the directory `plain`, which has the merged content.
    /// The stack is not mounted yet. With `base`, the lowest layer is a base of the container.
    #[must_use]
    pub fn new(
        store: Store,
        under: Under,
        lowers: Vec<PathBuf>,
        plain: PathBuf,
        base: bool,
    ) -> Pair {
        let scratch = store.scratch();
        let tested = scratch.make("tested");
        let mut stack = Stack {
            lowers,
            upper: None,
        };
        match under {
            Under::Container => {
                layout::make(store.path(), NAME, &stack.lowers, base).expect("laying out a store");
            }
            Under::Plain => layers::copy_tree(&plain, &tested),
            Under::Cowlfs(_) | Under::Kernel => {
                let (upper, work) = (scratch.make("upper"), scratch.make("work"));
                // The root directory gets its attributes from the topmost layer.
                layers::copy_root(&stack.lowers[0], &upper).expect("the root's attributes");
                stack.upper = Some((upper, work));
            }
        }
        Pair {
            tested,
            plain,
            mounted: None,
            under,
            stack,
            store,
            taken: Vec::new(),
            pushed: 0,
            flattened: false,
            exclusion: Arc::default(),
        }
    }

    /// Creates a pair over an existing `stack`, whose upper another program has written. It is mounted by cowlfs.
    #[must_use]
    pub fn over(store: Store, stack: Stack, plain: PathBuf, options: &'static str) -> Pair {
        let tested = store.scratch().make("tested");
        Pair {
            tested,
            plain,
            mounted: None,
            under: Under::Cowlfs(options),
            stack,
            store,
            taken: Vec::new(),
            pushed: 0,
            flattened: false,
            exclusion: Arc::default(),
        }
    }

    /// Returns a function that runs a command, such as `snapshot`, on the container, while no command of this pair runs.
    pub fn commands(&self) -> impl Fn(&str) -> Output + Send + use<> {
        let (exclusion, store) = (self.exclusion.clone(), self.store.path().to_owned());
        let settings: Vec<_> = self.store.settings().collect();
        move |verb| {
            let _alone = exclusion.lock();
            let mut command = Command::new(crate::programs::cowl());
            command.arg("--store").arg(&store).args([verb, NAME]);
            command.envs(settings.iter().copied());
            run_command(command, b"")
        }
    }

    /// Returns the number of snapshots that this pair has taken.
    #[must_use]
    pub fn snapshots(&self) -> usize {
        self.taken.len()
    }

    /// Mounts the stack.
    pub fn mount(&mut self) {
        let exclusion = self.exclusion.clone();
        let _alone = exclusion.lock();
        match self.under {
            Under::Container => self.tested = self.store.mount(NAME),
            Under::Cowlfs(options) => {
                // In a plain directory, names that begin with `.wh.` are names like any other.
                let options = format!("nofuse_overlayfs,{options}");
                self.mounted = Some(Overlay::cowlfs(&self.stack, &self.tested, &options));
            }
            Under::Kernel => self.mounted = Some(Overlay::kernel(&self.stack, &self.tested)),
            Under::Plain => {}
        }
    }

    /// Unmounts the stack; no file in it may be open.
    pub fn unmount(&mut self) {
        if self.under == Under::Container {
            self.retry_while_busy(&["umount", NAME]).ok();
        } else if let Some(mounted) = self.mounted.take() {
            mounted.unmount();
        }
    }

    /// Runs a command, and retries while it reports that the container is in use: RELEASE reaches the daemon
    /// asynchronously after the last close.
    fn retry_while_busy(&self, arguments: &[&str]) -> Output {
        let _alone = self.exclusion.lock();
        let start = Instant::now();
        loop {
            let output = self.store.cowl(arguments);
            if output.code != 4 || start.elapsed() > TIMEOUT {
                return output;
            }
        }
    }

    /// Returns whether a snapshot can be taken while the stack is mounted.
    #[must_use]
    pub fn can_push(&self) -> bool {
        self.under == Under::Container
    }

    /// Freezes the upper layer. With `live`, the stack stays mounted if it can.
    pub fn snapshot(&mut self, live: bool) {
        let live = live && self.under == Under::Container;
        if !live {
            self.unmount();
        }
        match self.under {
            Under::Container => {
                let tree = tree::read(&self.plain).expect("reading the plain tree");
                let name = format!("s{}", self.taken.len());
                self.retry_while_busy(&["snapshot", NAME, "--name", &name])
                    .ok();
                self.taken.push(Snapshot { name, tree });
            }
            Under::Cowlfs(_) | Under::Kernel => {
                self.pushed += 1;
                let scratch = self.store.scratch();
                let name = |prefix| format!("{prefix}{}", self.pushed);
                let (upper, work) = (scratch.make(&name("upper")), scratch.make(&name("work")));
                if let Some((old, _)) = self.stack.upper.replace((upper.clone(), work)) {
                    layers::copy_root(&old, &upper).expect("the root's attributes");
                    self.stack.lowers.insert(0, old);
                }
            }
            Under::Plain => {}
        }
        if !live {
            self.mount();
        }
    }

    /// Returns whether layers were merged since the last call.
    pub fn take_flattened(&mut self) -> bool {
        std::mem::take(&mut self.flattened)
    }

    /// Merges some adjacent layers. With `live`, the stack stays mounted.
    pub fn flatten(&mut self, which: u64, live: bool) {
        if self.under != Under::Container {
            return;
        }
        if !live {
            self.unmount();
        }
        self.flattened = true;
        let count = self.taken.len() as u64;
        let name = |index: u64| {
            let taken = usize::try_from(index).ok().and_then(|i| self.taken.get(i));
            taken.map_or(String::new(), |taken| taken.name.clone())
        };
        let range = match which % 4 {
            0 | 3 => String::new(),
            // From the base to a snapshot, or from a snapshot to the head.
            1 if count > 0 => format!("..{}", name(which / 4 % count)),
            2 if count > 1 => format!("{}..", name(which / 4 % (count - 1))),
            _ => String::new(),
        };
        let mut arguments = vec!["flatten", NAME];
        if !range.is_empty() {
            arguments.push(&range);
        }
        if which % 4 == 3 {
            arguments.push("--base");
        }
        let output = self.retry_while_busy(&arguments);
        // After its layers were merged, a snapshot cannot be the end of a range.
        if output.code != 1 || !output.err().contains("is not based on") {
            output.ok();
        }
        if !live {
            self.mount();
        }
    }

    /// Verifies that every snapshot has the content from when it was taken. The stack must not be mounted.
    pub fn check_snapshots(&self) -> Result<(), String> {
        for (index, taken) in self.taken.iter().enumerate() {
            let copy = format!("copy{index}");
            self.store.cowl(["restore", NAME, &taken.name, &copy]).ok();
            let mount_point = self.store.mount(&copy);
            let label = format!(
                "snapshot {} (first) and the tree when it was taken",
                taken.name
            );
            let found = tree::read(&mount_point).map_err(|error| format!("{label}: {error}"))?;
            self.retry_while_busy(&["umount", &copy]).ok();
            same(&label, &found, &taken.tree, Compare::HISTORY)?;
        }
        Ok(())
    }

    /// Returns a read-only stack of all layers.
    #[must_use]
    pub fn read_only(&self) -> Stack {
        if self.under == Under::Container {
            return Stack {
                lowers: layout::stack(self.store.path(), NAME).expect("the container's manifest"),
                upper: None,
            };
        }
        self.stack.read_only()
    }

    /// Returns the directory of all files of the pair.
    #[must_use]
    pub fn scratch(&self) -> &crate::scratch::Scratch {
        self.store.scratch()
    }

    /// Compares the tree at `mount_point` with the plain directory, and returns both.
    pub fn compare(
        &self,
        when: &str,
        mount_point: &Path,
        compare: Compare,
    ) -> Result<(Tree, Tree), String> {
        let found = tree::read(mount_point).map_err(|error| format!("{when}: reading: {error}"))?;
        let plain = tree::read(&self.plain).expect("reading the plain tree");
        same(when, &found, &plain, compare)?;
        Ok((found, plain))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // After a failure the mount may still exist: the scratch directory detaches it, and its daemon ends.
        drop(self.mounted.take());
    }
}

/// Returns an error that lists the differences between two trees; the first is the mounted one.
pub fn same(when: &str, mounted: &Tree, plain: &Tree, compare: Compare) -> Result<(), String> {
    let lines = tree::differences(mounted, plain, compare);
    if lines.is_empty() {
        return Ok(());
    }
    let first: String = lines
        .iter()
        .take(12)
        .map(|line| format!("\n    {line}"))
        .collect();
    Err(format!(
        "{when}, {} differences (mounted, then plain):{first}",
        lines.len()
    ))
}
