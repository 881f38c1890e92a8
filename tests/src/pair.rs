//! Two trees that must stay the same whatever is done to both: a mounted stack of layers and a plain
//! folder.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::command::Output;
use crate::cowl::Store;
use crate::mount::{Overlay, Stack};
use crate::tree::{self, Compare, Tree};
use crate::{layers, layout};

/// The container's name.
const NAME: &str = "c";
/// How long what was closed may count as open.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the first tree of the pair is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// A container of cowl's.
    Container,
    /// A stack that cowlfs mounts, with these options.
    Cowlfs(&'static str),
    /// The kernel's overlayfs, to try the test itself.
    Kernel,
    /// A plain folder, for the same.
    Plain,
}

impl Under {
    /// Whether it is cowl's own.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Under::Container | Under::Cowlfs(_))
    }
}

/// A snapshot that was taken.
#[derive(Debug)]
struct Taken {
    name: String,
    tree: Tree,
}

/// A mounted stack, and a plain folder that must stay the same.
#[derive(Debug)]
pub struct Pair {
    /// Where the mounted one shows.
    pub tested: PathBuf,
    /// The plain one.
    pub plain: PathBuf,
    mounted: Option<Overlay>,
    under: Under,
    stack: Stack,
    /// Everything lies in here; the store itself only for containers.
    store: Store,
    taken: Vec<Taken>,
    pushed: u32,
}

impl Pair {
    /// A pair of a stack of `lowers` (topmost first) and the folder `plain` with what it shows. It is
    /// not mounted yet. With `base` the lowest layer is a container's base.
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
                // The topmost layer gives the root its attributes.
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
        }
    }

    /// Goes on where somebody else has written: `stack` with its upper is mounted by cowlfs.
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
        }
    }

    /// Mounts it.
    pub fn mount(&mut self) {
        match self.under {
            Under::Container => self.tested = self.store.mount(NAME),
            Under::Cowlfs(options) => {
                self.mounted = Some(Overlay::cowlfs(&self.stack, &self.tested, options));
            }
            Under::Kernel => self.mounted = Some(Overlay::kernel(&self.stack, &self.tested)),
            Under::Plain => {}
        }
    }

    /// Unmounts it; nothing in it may be open.
    pub fn unmount(&mut self) {
        if self.under == Under::Container {
            self.when_free(&["umount", NAME]).ok();
        } else if let Some(mounted) = self.mounted.take() {
            mounted.unmount();
        }
    }

    /// Runs a command, again for as long as it says that something is in use: the daemon hears of the last
    /// close a moment after it.
    fn when_free(&self, arguments: &[&str]) -> Output {
        let start = Instant::now();
        loop {
            let output = self.store.cowl(arguments);
            if output.code != 4 || start.elapsed() > PATIENCE {
                return output;
            }
        }
    }

    /// Whether a snapshot can be taken while it is mounted.
    #[must_use]
    pub fn can_push(&self) -> bool {
        self.under == Under::Container
    }

    /// Makes the layer that was written so far one that is only read, while it is mounted where that
    /// can be done (`true`).
    pub fn snapshot(&mut self, live: bool) {
        let live = live && self.under == Under::Container;
        if !live {
            self.unmount();
        }
        match self.under {
            Under::Container => {
                let tree = tree::read(&self.plain).expect("reading the plain tree");
                let name = format!("s{}", self.taken.len());
                self.when_free(&["snapshot", NAME, "--name", &name]).ok();
                self.taken.push(Taken { name, tree });
            }
            Under::Cowlfs(_) | Under::Kernel => {
                self.pushed += 1;
                let scratch = self.store.scratch();
                let name = |what| format!("{what}{}", self.pushed);
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

    /// Merges some adjacent layers. Nothing in it may be open.
    pub fn flatten(&mut self, which: u64, mounted: bool) {
        if self.under != Under::Container {
            return;
        }
        if !mounted {
            self.unmount();
        }
        let count = self.taken.len() as u64;
        let name = |index: u64| {
            let taken = usize::try_from(index).ok().and_then(|i| self.taken.get(i));
            taken.map_or(String::new(), |taken| taken.name.clone())
        };
        let range = match which % 3 {
            0 => String::new(),
            // From the base up to a snapshot, from a snapshot up to now.
            1 if count > 0 => format!("..{}", name(which / 3 % count)),
            2 if count > 1 => format!("{}..", name(which / 3 % (count - 1))),
            _ => String::new(),
        };
        let mut arguments = vec!["flatten", NAME];
        if !range.is_empty() {
            arguments.push(&range);
        }
        let output = self.when_free(&arguments);
        // A snapshot whose layers were merged with others is no end of a range any more.
        if output.code != 1 || !output.err().contains("does not lie below") {
            output.ok();
        }
        if !mounted {
            self.mount();
        }
    }

    /// Every snapshot must still show what was there when it was taken. It must not be mounted.
    pub fn check_snapshots(&self) -> Result<(), String> {
        for (index, taken) in self.taken.iter().enumerate() {
            let copy = format!("copy{index}");
            self.store.cowl(["restore", NAME, &taken.name, &copy]).ok();
            let place = self.store.mount(&copy);
            let what = format!("snapshot {} (first) and what was there then", taken.name);
            let found = tree::read(&place).map_err(|error| format!("{what}: {error}"))?;
            self.when_free(&["umount", &copy]).ok();
            same(&what, &found, &taken.tree, Compare::HISTORY)?;
        }
        Ok(())
    }

    /// All layers, to be read only.
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

    /// Where everything lies.
    #[must_use]
    pub fn scratch(&self) -> &crate::scratch::Scratch {
        self.store.scratch()
    }

    /// The trees at `place` and of the plain folder, which must be the same.
    pub fn compare(
        &self,
        when: &str,
        place: &Path,
        compare: Compare,
    ) -> Result<(Tree, Tree), String> {
        let found = tree::read(place).map_err(|error| format!("{when}: reading: {error}"))?;
        let plain = tree::read(&self.plain).expect("reading the plain tree");
        same(when, &found, &plain, compare)?;
        Ok((found, plain))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // What a failure left mounted: the scratch folder detaches it, and its daemon ends.
        drop(self.mounted.take());
    }
}

/// Says in what two trees differ; the first is the mounted one.
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
