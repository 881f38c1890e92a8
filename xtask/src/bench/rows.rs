//! Defines the rows of the mounted comparison: layers, preparation and measured work.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::load::{self, Each, There};
use crate::run::{Result, Run};

/// Sizes of the work.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Sizes {
    /// Number of files in the trees that are walked and changed.
    pub(super) files: usize,
    /// Number of files whose owner is changed.
    pub(super) owned: usize,
    /// Number of names in the flat directory.
    pub(super) names: usize,
    /// Size of the big file and of the library.
    pub(super) big_mib: usize,
    /// Percentage of the full number of loop iterations.
    pub(super) percent: usize,
}

impl Sizes {
    /// Returns the number of iterations of a loop that has `full` iterations at 100 percent.
    fn times(&self, full: usize) -> usize {
        (full * self.percent / 100).max(10)
    }
}

/// A set of lower layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lowers {
    /// One tree of small files.
    Small,
    /// Two big files, one of which is a library.
    Big,
    /// One directory of empty files.
    Flat,
    /// A tree of files for chown.
    Owned,
    /// The files of the small tree, distributed over this number of layers.
    Many(usize),
    /// A hundred files.
    Few,
}

impl Lowers {
    /// Every set of layers.
    pub(super) const ALL: [Self; 8] = [
        Self::Small,
        Self::Big,
        Self::Flat,
        Self::Owned,
        Self::Many(2),
        Self::Many(64),
        Self::Many(500),
        Self::Few,
    ];

    /// Returns the layers below `top`. The names are short, because all of them must fit into the page of options that
    /// mount(2) accepts.
    pub(super) fn at(self, top: &Path) -> Layers {
        let one = |name: &str| Layers {
            directory: top.to_owned(),
            names: vec![name.to_owned()],
        };
        match self {
            Self::Small => one("small"),
            Self::Big => one("big"),
            Self::Flat => one("flat"),
            Self::Owned => one("owned"),
            Self::Few => one("few"),
            Self::Many(layers) => Layers {
                directory: top.join(format!("many{layers}")),
                names: (0..layers).map(|layer| layer.to_string()).collect(),
            },
        }
    }
}

/// Lower layers on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layers {
    /// The directory that they are in.
    pub(super) directory: PathBuf,
    /// Their names in it, topmost first.
    pub(super) names: Vec<String>,
}

/// Rows that share a table and a chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Group {
    /// Names and attributes.
    Metadata,
    /// Content of files.
    Data,
    /// Creation and removal.
    Changes,
    /// First change of a lower file.
    CopyUp,
    /// Complete programs.
    Programs,
    /// Time of a mount.
    Mounting,
    /// Work in a container.
    Work,
}

impl Group {
    /// The groups of `bench mounted`, in the order of the report.
    pub(super) const MOUNTED: [Self; 6] = [
        Self::Metadata,
        Self::Data,
        Self::Changes,
        Self::CopyUp,
        Self::Programs,
        Self::Mounting,
    ];

    /// Returns the heading of the group, and the name of its chart.
    pub(super) fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Metadata => ("Names and attributes", "metadata"),
            Self::Data => ("Data", "data"),
            Self::Changes => ("Creation and removal", "changes"),
            Self::CopyUp => ("First change of lower files", "copy-up"),
            Self::Programs => ("Programs", "programs"),
            Self::Mounting => ("Mounting", "mounting"),
            Self::Work => ("Work in a container", "work"),
        }
    }
}

/// Environment of the measured work.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Environment {
    /// The mount.
    pub(super) root: PathBuf,
    /// A tar of the small tree.
    pub(super) tar: PathBuf,
    /// Sizes of the work.
    pub(super) sizes: Sizes,
}

type Work = fn(&Environment) -> Result<Duration>;

/// The measured operation of a row.
#[derive(Clone, Copy, Debug)]
pub(super) enum Measured {
    /// Work on a mount, after optional preparation on the same mount.
    Work(Option<Work>, Work),
    /// Work on a mount with empty caches.
    Cold(Work),
    /// The mount operation itself; the unmount is not measured.
    Mount,
    /// Work on a second mount of the same layers, after the first mount has read the same file.
    Second(Work),
}

/// A row of the comparison.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) group: Group,
    pub(super) lowers: Lowers,
    pub(super) measured: Measured,
    /// Unit of the work, and the number of units.
    pub(super) unit: &'static str,
    pub(super) units: fn(&Sizes) -> usize,
}

fn shell(env: &Environment, line: &str) -> Result<Duration> {
    let start = Instant::now();
    let line = format!("cd '{}' && {line}", env.root.display());
    Run::shell(&line).unseen().run()?;
    Ok(start.elapsed())
}

fn walk(env: &Environment) -> Result<Duration> {
    load::walk(&env.root.join("tree"), 1)
}

fn read_all(env: &Environment) -> Result<Duration> {
    load::each(&env.root.join("tree"), Each::Read)
}

fn read_big(env: &Environment) -> Result<Duration> {
    load::read(&env.root.join("big"))
}

fn touch_big(env: &Environment) -> Result<Duration> {
    load::touch(&env.root.join("big"))
}

fn fill(env: &Environment) -> Result<Duration> {
    load::tree(&env.root.join("flat"), env.sizes.files, 64)
}

fn first_file(env: &Environment) -> PathBuf {
    env.root.join("tree/d00000/f00")
}

fn map_lib(env: &Environment) -> Result<Duration> {
    load::mapped(&env.root.join("lib.so"), env.sizes.times(50_000))
}

const fn row(name: &'static str, group: Group, lowers: Lowers, measured: Measured) -> Row {
    Row {
        name,
        group,
        lowers,
        measured,
        unit: "file",
        units: |sizes| sizes.files,
    }
}

impl Row {
    const fn by(mut self, unit: &'static str, units: fn(&Sizes) -> usize) -> Self {
        self.unit = unit;
        self.units = units;
        self
    }
}

/// Returns all rows, in the order of the report.
pub(super) fn all() -> Vec<Row> {
    let mut rows = metadata();
    rows.extend(data());
    rows.extend(changes());
    rows.extend(copy_up());
    rows.extend(programs());
    rows.extend(mounting());
    rows
}

fn metadata() -> Vec<Row> {
    use Lowers::{Flat, Many, Small};
    use Measured::Work;
    let row = |name, lowers, measured| row(name, Group::Metadata, lowers, measured);
    let threads: self::Work = |env| load::walk(&env.root.join("tree"), 4);
    let list: self::Work = |env| load::list(&env.root.join("flat"));
    let stat: self::Work = |env| load::stat(&first_file(env), env.sizes.times(200_000));
    let missing: self::Work =
        |env| load::missing(&env.root.join("tree/d00000"), env.sizes.times(50_000));
    let open: self::Work = |env| load::open_close(&first_file(env), env.sizes.times(20_000));
    vec![
        row("walk-first", Small, Work(None, walk)),
        row("walk-again", Small, Work(Some(walk), walk)),
        row("walk-4threads", Small, Work(None, threads)),
        row("walk-2layers", Many(2), Work(None, walk)),
        row("walk-64layers", Many(64), Work(None, walk)),
        row("walk-64layers-again", Many(64), Work(Some(walk), walk)),
        row("walk-500layers", Many(500), Work(None, walk)),
        row("walk-500layers-again", Many(500), Work(Some(walk), walk)),
        row("readdir-10k", Flat, Work(None, list)).by("name", |sizes| sizes.names),
        row("stat-hot", Small, Work(None, stat)).by("call", |sizes| sizes.times(200_000)),
        row("missing-names", Small, Work(None, missing)).by("call", |sizes| sizes.times(50_000)),
        row("open-close", Small, Work(None, open)).by("time", |sizes| sizes.times(20_000)),
        row("read-small-first", Small, Work(None, read_all)),
        row("read-small-again", Small, Work(Some(read_all), read_all)),
    ]
}

fn data() -> Vec<Row> {
    use Lowers::Big;
    use Measured::{Cold, Second, Work};
    fn at_random(env: &Environment, full: usize, access: There) -> Result<Duration> {
        load::random(&env.root.join("big"), env.sizes.times(full), access)
    }
    let row =
        |name, measured| row(name, Group::Data, Big, measured).by("MiB", |sizes| sizes.big_mib);
    let read: self::Work = |env| at_random(env, 50_000, There::Read);
    let write: self::Work = |env| at_random(env, 20_000, There::Write);
    let commit: self::Work = |env| at_random(env, 300, There::Commit);
    let map: self::Work = |env| load::mapped(&env.root.join("big"), env.sizes.times(50_000));
    let new: self::Work = |env| load::write(&env.root.join("new"), env.sizes.big_mib);
    vec![
        row("seqread-warm", Work(Some(read_big), read_big)),
        row("seqread-cold", Cold(read_big)),
        row("randread-upper", Work(Some(touch_big), read)).by("page", |sizes| sizes.times(50_000)),
        row("mmapread", Work(None, map)).by("page", |sizes| sizes.times(50_000)),
        row("mmapread-lib", Work(None, map_lib)).by("page", |sizes| sizes.times(50_000)),
        row("second-container-lib", Second(map_lib)).by("page", |sizes| sizes.times(50_000)),
        row("seqwrite", Work(None, new)),
        row("randwrite-upper", Work(Some(touch_big), write))
            .by("page", |sizes| sizes.times(20_000)),
        row("db-fdatasync", Work(Some(touch_big), commit)).by("page", |sizes| sizes.times(300)),
    ]
}

fn changes() -> Vec<Row> {
    use Lowers::{Flat, Small};
    use Measured::Work;
    let row = |name, lowers, measured| row(name, Group::Changes, lowers, measured);
    let create: self::Work = |env| load::tree(&env.root, env.sizes.files, 4096);
    let untar: self::Work = |env| shell(env, &format!("tar xf '{}'", env.tar.display()));
    let dpkg: self::Work = |env| load::replace(&env.root, env.sizes.times(200));
    let remove: self::Work = |env| load::remove(&env.root.join("tree"));
    let remove_new: self::Work = |env| load::remove(&env.root.join("flat"));
    let rename: self::Work = |env| load::each(&env.root.join("tree"), Each::Rename);
    let move_directory: self::Work = |env| shell(env, "mv tree moved");
    vec![
        row("create-small", Flat, Work(None, create)),
        row("untar", Flat, Work(None, untar)),
        row("dpkg-like", Flat, Work(None, dpkg)).by("file", |sizes| sizes.times(200)),
        row("unlink-lower", Small, Work(None, remove)),
        row("unlink-upper", Flat, Work(Some(fill), remove_new))
            .by("file", |sizes| sizes.files + sizes.names),
        row("rename-lower", Small, Work(None, rename)),
        row("mv-lower-dir", Small, Work(None, move_directory)).by("time", |_| 1),
    ]
}

fn copy_up() -> Vec<Row> {
    use Lowers::{Big, Owned, Small};
    use Measured::Work;
    let row = |name, lowers, measured| row(name, Group::CopyUp, lowers, measured);
    let append: self::Work = |env| load::each(&env.root.join("tree"), Each::Append);
    let chmod: self::Work = |env| load::each(&env.root.join("tree"), Each::Chmod);
    let chown: self::Work = |env| shell(env, "chown -R 4711:4712 tree");
    vec![
        row("copyup-small", Small, Work(None, append)),
        row("copyup-meta", Small, Work(None, chmod)),
        row("chown-r", Owned, Work(None, chown)).by("file", |sizes| sizes.owned),
        row("copyup-big-1byte", Big, Work(None, touch_big)).by("time", |_| 1),
    ]
}

fn programs() -> Vec<Row> {
    use Measured::Work;
    let row = |name, measured| row(name, Group::Programs, Lowers::Small, measured);
    let grep: self::Work = |env| shell(env, "{ grep -r needle tree || true; }");
    let copy: self::Work = |env| shell(env, "cp -a tree copy");
    let remove: self::Work = |env| shell(env, "rm -rf tree");
    let find: self::Work = |env| shell(env, "find tree -ls > /dev/null");
    vec![
        row("grep-r", Work(None, grep)),
        row("cp-a", Work(None, copy)),
        row("rm-rf", Work(None, remove)),
        row("find-first", Work(None, find)).by("directory", |sizes| sizes.files / 100 + 1),
        row("find-again", Work(Some(find), find)).by("directory", |sizes| sizes.files / 100 + 1),
    ]
}

fn mounting() -> Vec<Row> {
    let row = |name, lowers| row(name, Group::Mounting, lowers, Measured::Mount).by("time", |_| 1);
    vec![
        row("mount-2layers", Lowers::Many(2)),
        row("mount-64layers", Lowers::Many(64)),
        row("mount-500layers", Lowers::Many(500)),
        row("mount-few-files", Lowers::Few),
        row("mount-many-files", Lowers::Owned),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_unique_name_and_existing_layers() {
        let rows = all();
        for (index, row) in rows.iter().enumerate() {
            assert!(
                rows.iter()
                    .skip(index + 1)
                    .all(|other| other.name != row.name)
            );
            assert!(Lowers::ALL.contains(&row.lowers), "{}", row.name);
        }
    }

    #[test]
    fn five_hundred_layers_fit_into_one_page_of_mount_options() {
        let layers = Lowers::Many(500).at(Path::new("/top"));
        assert!(layers.names.join(":").len() < 3000);
    }
}
