//! Work on a mount: in this process, or in another one that can access a mount in the namespaces of a plain user.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::load;
use super::rows::{self, Environment, Measured, Row};
use crate::run::{Failure, Result, failure, note};

/// A step of a measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    /// The preparation of a row, if it has one.
    Prepare,
    /// The measured work of a row.
    Work,
    /// Read the library.
    ReadLibrary,
    /// Walk the tree.
    Walk,
    /// Sync the file system.
    Sync,
    /// Check that this path is visible.
    Check(PathBuf),
}

/// A step and its environment.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Task {
    /// Name of the row; steps other than preparation and work have none.
    row: String,
    step: Step,
    environment: Environment,
}

/// Hidden options of `cargo xtask bench task`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Options {
    /// The task as JSON
    task: String,
}

impl Task {
    /// Creates a step of a row.
    pub(super) fn of(row: &Row, step: Step, environment: &Environment) -> Self {
        Self {
            row: row.name.to_owned(),
            step,
            environment: environment.clone(),
        }
    }

    /// Creates a step that does not depend on a row.
    pub(super) fn plain(step: Step, root: &Path) -> Self {
        Self {
            row: String::new(),
            step,
            environment: Environment {
                root: root.to_owned(),
                ..Environment::default()
            },
        }
    }

    /// Performs the step, and returns the time that it took.
    pub(super) fn perform(&self) -> Result<Duration> {
        let env = &self.environment;
        let row = || {
            let found = rows::all().into_iter().find(|row| row.name == self.row);
            found.ok_or_else(|| Failure(format!("unknown row {}", self.row)))
        };
        match &self.step {
            Step::Prepare => match row()?.measured {
                Measured::Work(Some(prepare), _) => prepare(env),
                _ => Ok(Duration::ZERO),
            },
            Step::Work => match row()?.measured {
                Measured::Work(_, work) | Measured::Cold(work) | Measured::Second(work) => {
                    work(env)
                }
                Measured::Mount => failure("a row for mounting has no work"),
            },
            Step::ReadLibrary => load::read(&env.root.join("lib.so")),
            Step::Walk => load::walk(&env.root.join("tree"), 1),
            Step::Sync => {
                let start = Instant::now();
                sync(&env.root)?;
                Ok(start.elapsed())
            }
            Step::Check(path) => {
                std::fs::metadata(env.root.join(path))?;
                Ok(Duration::ZERO)
            }
        }
    }

    /// Returns the arguments with which this program performs the step.
    pub(super) fn arguments(&self) -> Result<[String; 3]> {
        let text = serde_json::to_string(self)
            .map_err(|error| Failure(format!("cannot serialize a task: {error}")))?;
        Ok(["bench".to_owned(), "task".to_owned(), text])
    }
}

/// Returns the path of this program; in a unit test, that of the program beside it.
pub(super) fn program() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    Ok(match own.parent() {
        Some(deps) if deps.ends_with("deps") => deps.with_file_name("xtask"),
        _ => own,
    })
}

/// Syncs the file system of a directory.
pub(super) fn sync(path: &Path) -> Result<()> {
    let directory = std::fs::File::open(path)?;
    rustix::fs::syncfs(directory).map_err(std::io::Error::from)?;
    Ok(())
}

/// Performs the task of the command line, and prints its time in nanoseconds as the last line.
pub(super) fn run(options: &Options) -> Result<()> {
    let task: Task = serde_json::from_str(&options.task)
        .map_err(|error| Failure(format!("invalid task: {error}")))?;
    note(&task.perform()?.as_nanos().to_string());
    Ok(())
}

/// Returns the time that [`run`] has printed.
pub(super) fn printed_time(output: &str) -> Result<Duration> {
    let last = output.lines().next_back().unwrap_or_default();
    match last.parse() {
        Ok(nanoseconds) => Ok(Duration::from_nanos(nanoseconds)),
        Err(_) => failure(format!("a task did not report its time: {output}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_task_survives_the_command_line() {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment {
            root: dir.path().to_owned(),
            tar: "small.tar".into(),
            ..Environment::default()
        };
        std::fs::create_dir(dir.path().join("tree")).unwrap();
        load::tree(&dir.path().join("tree"), 10, 1).unwrap();
        let row = rows::all().remove(0);
        for task in [
            Task::of(&row, Step::Work, &environment),
            Task::plain(Step::Check("tree/d00000/f00".into()), dir.path()),
        ] {
            let [_, _, text] = task.arguments().unwrap();
            let again: Task = serde_json::from_str(&text).unwrap();
            assert!(again.perform().is_ok());
        }
    }

    #[test]
    fn the_last_line_of_a_task_is_its_time() {
        let time = printed_time("something else\n1500\n").unwrap();
        assert_eq!(time, Duration::from_nanos(1500));
        assert!(printed_time("").is_err());
    }
}
