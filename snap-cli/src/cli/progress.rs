//! How far a long work has come: a bar with rate and time left, on a terminal only, and only when it
//! takes longer than a second.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{quiet, size};
use crate::tree::error::Progress;

/// Nothing is drawn before.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two drawings.
const PAUSE: Duration = Duration::from_millis(100);

/// Tells how far a long work has come.
pub(super) struct Bar {
    doing: &'static str,
    wanted: bool,
    began: Instant,
    last: Instant,
    drawn: Option<ProgressBar>,
}

impl Bar {
    pub(super) fn new(doing: &'static str) -> Self {
        let now = Instant::now();
        Self {
            doing,
            wanted: std::io::stderr().is_terminal() && !quiet(),
            began: now,
            last: now,
            drawn: None,
        }
    }

    pub(super) fn tell(&mut self, done: Progress) {
        let lasted = self.began.elapsed();
        if !self.wanted || lasted < PATIENCE || self.last.elapsed() < PAUSE {
            return;
        }
        self.last = Instant::now();
        let bar = self.drawn.get_or_insert_with(|| match done.total {
            Some(total) => measured(total),
            None => ProgressBar::new_spinner(),
        });
        if let Some(total) = done.total {
            bar.set_length(total.max(done.bytes));
            bar.set_position(done.bytes);
        }
        bar.set_message(told(self.doing, done, lasted));
        bar.tick();
    }
}

/// A bar that fills.
fn measured(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    // Only a mistake in the template would fail, and the plain bar is then as good.
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {percent:>3}% {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// The words beside it: done so far, how fast, how long still.
fn told(doing: &str, done: Progress, lasted: Duration) -> String {
    let seconds = lasted.as_secs().max(1);
    let rate = done.bytes / seconds;
    let so_far = match done.total {
        Some(total) => format!("{} of {}", size(done.bytes), size(total.max(done.bytes))),
        None => size(done.bytes),
    };
    let mut text = format!(
        "{doing}: {} files, {so_far}, {}/s",
        done.entries,
        size(rate)
    );
    if let (Some(total), 1..) = (done.total, rate) {
        text.push_str(", ");
        text.push_str(&left(total.saturating_sub(done.bytes) / rate));
    }
    text
}

fn left(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s left"),
        60..3600 => format!("{} min {} s left", seconds / 60, seconds % 60),
        _ => format!("{} h {} min left", seconds / 3600, seconds % 3600 / 60),
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.drawn {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left() {
        let done = Progress {
            entries: 7,
            bytes: 100 << 20,
            total: Some(300 << 20),
        };
        assert_eq!(
            told("importing", done, Duration::from_secs(10)),
            "importing: 7 files, 100 MiB of 300 MiB, 10.0 MiB/s, 20 s left"
        );
        let done = Progress {
            total: None,
            ..done
        };
        assert_eq!(
            told("importing", done, Duration::from_secs(10)),
            "importing: 7 files, 100 MiB, 10.0 MiB/s"
        );
        assert_eq!(left(61), "1 min 1 s left");
        assert_eq!(left(7300), "2 h 1 min left");
        // A total that was too small, and a work that writes nothing.
        let done = Progress {
            entries: 1,
            bytes: 3,
            total: Some(2),
        };
        assert!(told("x", done, Duration::ZERO).ends_with("3 B of 3 B, 3 B/s, 0 s left"));
        let done = Progress {
            entries: 1,
            bytes: 0,
            total: Some(2),
        };
        assert!(told("x", done, Duration::ZERO).ends_with("0 B of 2 B, 0 B/s"));
    }

    #[test]
    fn nothing_is_drawn_in_the_first_second() {
        let mut bar = Bar::new("x");
        bar.wanted = true;
        bar.last = bar.began.checked_sub(PAUSE).unwrap();
        bar.tell(Progress::default());
        assert!(bar.drawn.is_none());
        bar.began = bar.began.checked_sub(PATIENCE).unwrap();
        bar.last = bar.last.checked_sub(PAUSE).unwrap();
        bar.tell(Progress::default());
        assert!(bar.drawn.is_some());
    }
}
