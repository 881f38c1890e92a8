//! Named points at which a test ends or delays the daemon (docs/decisions/0035), and safeguards that it disables.
//!
//! Only builds with debug assertions have them. With `COWL_KILL=NAME/STRIDE/OFFSET/FILE` in the environment, the process
//! kills itself at each passing of the point NAME whose number is OFFSET modulo STRIDE. The processes of a mount count
//! together: each passing appends one byte to FILE. Without a NAME no process ends, and each passing of any point appends
//! a line with its name. With `COWL_DELAY=NAME/MILLISECONDS`, each passing of the point NAME takes that long; with
//! `COWL_DELAY=NAME/FILE`, as long as the file with that absolute path exists. With
//! `COWL_DISABLE=NAME`, the process omits the safeguard NAME, so that a test can show that it would find its absence.

#[cfg(debug_assertions)]
mod armed {
    use std::io::{Seek as _, Write as _};
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    static IS_ARMED: AtomicBool = AtomicBool::new(false);
    static SELECTED: OnceLock<Option<Selected>> = OnceLock::new();
    static DELAYED: OnceLock<Option<(String, Delay)>> = OnceLock::new();

    /// The time that the passing of a point takes.
    enum Delay {
        For(Duration),
        /// As long as the file exists.
        While(PathBuf),
    }

    impl Delay {
        fn wait(&self) {
            match self {
                Self::For(time) => std::thread::sleep(*time),
                Self::While(file) => {
                    while file.try_exists().unwrap_or(false) {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
            }
        }
    }

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

    fn delayed_from_environment() -> Option<(String, Delay)> {
        let value = std::env::var("COWL_DELAY").ok()?;
        let (name, delay) = value.split_once('/')?;
        let delay = match delay.parse() {
            Ok(milliseconds) => Delay::For(Duration::from_millis(milliseconds)),
            Err(_) => Delay::While(delay.into()),
        };
        Some((name.to_owned(), delay))
    }

    pub(super) fn is_disabled(name: &str) -> bool {
        static DISABLED: OnceLock<Option<std::ffi::OsString>> = OnceLock::new();
        let disabled = DISABLED.get_or_init(|| std::env::var_os("COWL_DISABLE"));
        disabled.as_deref().is_some_and(|disabled| disabled == name)
    }

    pub(super) fn arm() {
        IS_ARMED.store(true, Ordering::Relaxed);
    }

    pub(super) fn pass(name: &str) {
        if let Some((delayed, delay)) = DELAYED.get_or_init(delayed_from_environment)
            && delayed == name
        {
            delay.wait();
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

/// Whether a test has disabled the safeguard with this name.
#[inline(always)]
#[must_use]
pub fn is_disabled(_name: &str) -> bool {
    #[cfg(debug_assertions)]
    return armed::is_disabled(_name);
    #[cfg(not(debug_assertions))]
    false
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
