//! Named points at which a test ends or delays the daemon (docs/decisions/0035).
//!
//! Only builds with debug assertions have them. With `COWL_KILL=NAME/STRIDE/OFFSET/FILE` in the environment, the process
//! kills itself at each passing of the point NAME whose number is OFFSET modulo STRIDE. The processes of a mount count
//! together: each passing appends one byte to FILE. Without a NAME no process ends, and each passing of any point appends
//! a line with its name. With `COWL_DELAY=NAME/MILLISECONDS`, each passing of the point NAME takes that long.

#[cfg(debug_assertions)]
mod armed {
    use std::io::{Seek as _, Write as _};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    static IS_ARMED: AtomicBool = AtomicBool::new(false);
    static SELECTED: OnceLock<Option<Selected>> = OnceLock::new();
    static DELAYED: OnceLock<Option<(String, Duration)>> = OnceLock::new();

    /// The passings at which the process ends.
    struct Selected {
        name: String,
        stride: u64,
        offset: u64,
        file: PathBuf,
    }

    impl Selected {
        fn from_environment() -> Option<Self> {
            let value = std::env::var("COWL_KILL").ok()?;
            let mut parts = value.splitn(4, '/');
            Some(Self {
                name: parts.next()?.to_owned(),
                stride: parts.next()?.parse().ok().filter(|stride| *stride > 0)?,
                offset: parts.next()?.parse().ok()?,
                file: parts.next()?.into(),
            })
        }

        /// Counts a passing, and returns its number.
        fn count(&self) -> std::io::Result<u64> {
            let mut file = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&self.file)?;
            file.write_all(b".")?;
            file.stream_position()
        }

        /// Records a passing of any point.
        fn list(&self, name: &str) -> std::io::Result<()> {
            let mut file = std::fs::OpenOptions::new()
                .append(true)
                .create(true)
                .open(&self.file)?;
            file.write_all(format!("{name}\n").as_bytes())
        }
    }

    fn delayed_from_environment() -> Option<(String, Duration)> {
        let value = std::env::var("COWL_DELAY").ok()?;
        let (name, milliseconds) = value.split_once('/')?;
        let delay = Duration::from_millis(milliseconds.parse().ok()?);
        Some((name.to_owned(), delay))
    }

    pub(super) fn arm() {
        IS_ARMED.store(true, Ordering::Relaxed);
    }

    pub(super) fn pass(name: &str) {
        if let Some((delayed, delay)) = DELAYED.get_or_init(delayed_from_environment)
            && delayed == name
        {
            std::thread::sleep(*delay);
        }
        if !IS_ARMED.load(Ordering::Relaxed) {
            return;
        }
        let selected = SELECTED.get_or_init(Selected::from_environment);
        let Some(selected) = selected else {
            return;
        };
        if selected.name.is_empty() {
            if let Err(error) = selected.list(name) {
                log::error!("cannot record the passing of a point: {error}");
            }
            return;
        }
        if selected.name != name {
            return;
        }
        match selected.count() {
            Ok(number) if number % selected.stride == selected.offset => {
                let killed = rustix::process::kill_process(
                    rustix::process::getpid(),
                    rustix::process::Signal::KILL,
                );
                log::error!("cannot end at a point: {killed:?}");
            }
            Ok(_) => {}
            Err(error) => log::error!("cannot count the passings of a point: {error}"),
        }
    }
}

/// Lets this process end at points. The keeper, which must not end, is never armed.
#[inline(always)]
pub fn arm() {
    #[cfg(debug_assertions)]
    armed::arm();
}

/// Passes the point with this name.
#[inline(always)]
pub fn point(_name: &str) {
    #[cfg(debug_assertions)]
    armed::pass(_name);
}

/// A system call in progress that changes files, with a point before it and one after it.
#[derive(Debug)]
pub struct Changing(());

/// Passes the point before a system call that changes files. To drop the result passes the one after it.
#[must_use]
#[inline(always)]
pub fn changing() -> Changing {
    point("before a change");
    Changing(())
}

impl Drop for Changing {
    #[inline(always)]
    fn drop(&mut self) {
        point("after a change");
    }
}
