//! Progress bars with rate and remaining time, for work that takes longer than a second, and only on a terminal.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::{format_size, is_quiet};
use crate::tree::error::Progress;

/// The time before a bar appears.
const DELAY: Duration = Duration::from_secs(1);
/// The minimum time between two updates of a bar.
const INTERVAL: Duration = Duration::from_millis(100);

/// A progress bar.
pub(super) struct Bar {
    activity: &'static str,
    enabled: bool,
    began: Instant,
    last: Instant,
    drawn: Option<ProgressBar>,
}

impl Bar {
    /// Creates a bar, which appears later; `activity` is its label.
    pub(super) fn new(activity: &'static str) -> Self {
        let now = Instant::now();
        Self {
            activity,
            enabled: std::io::stderr().is_terminal() && !is_quiet(),
            began: now,
            last: now,
            drawn: None,
        }
    }

    /// Updates the bar, unless the last update was a moment ago.
    pub(super) fn update(&mut self, done: Progress) {
        let elapsed = self.began.elapsed();
        if !self.enabled || elapsed < DELAY || self.last.elapsed() < INTERVAL {
            return;
        }
        self.last = Instant::now();
        let bar = self.drawn.get_or_insert_with(|| match done.total {
            Some(total) => with_length(total),
            None => ProgressBar::new_spinner(),
        });
        if let Some(total) = done.total {
            bar.set_length(total.max(done.bytes));
            bar.set_position(done.bytes);
        }
        bar.set_message(message(self.activity, done, elapsed));
        bar.tick();
    }
}

/// Creates a bar that fills.
fn with_length(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    // Fails only if the template is invalid; then the default style is used.
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {percent:>3}% {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

/// Formats the text next to a bar: the completed work, the rate, and the remaining time.
fn message(activity: &str, done: Progress, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs().max(1);
    let rate = done.bytes / seconds;
    let bytes = format_size(done.bytes);
    let completed = match done.total {
        Some(total) => format!("{bytes} of {}", format_size(total.max(done.bytes))),
        None => bytes,
    };
    let mut text = format!(
        "{activity}: {} files, {completed}, {}/s",
        done.entries,
        format_size(rate)
    );
    if let (Some(total), 1..) = (done.total, rate) {
        text.push_str(", ");
        text.push_str(&remaining(total.saturating_sub(done.bytes) / rate));
    }
    text
}

fn remaining(seconds: u64) -> String {
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
    fn the_message_has_rate_and_remaining_time() {
        let done = Progress {
            entries: 7,
            bytes: 100 << 20,
            total: Some(300 << 20),
        };
        assert_eq!(
            message("importing", done, Duration::from_secs(10)),
            "importing: 7 files, 100 MiB of 300 MiB, 10.0 MiB/s, 20 s left"
        );
        let done = Progress {
            total: None,
            ..done
        };
        assert_eq!(
            message("importing", done, Duration::from_secs(10)),
            "importing: 7 files, 100 MiB, 10.0 MiB/s"
        );
        assert_eq!(remaining(61), "1 min 1 s left");
        assert_eq!(remaining(7300), "2 h 1 min left");
        // A total that is too small, and work that writes nothing.
        let done = Progress {
            entries: 1,
            bytes: 3,
            total: Some(2),
        };
        assert!(message("x", done, Duration::ZERO).ends_with("3 B of 3 B, 3 B/s, 0 s left"));
        let done = Progress {
            entries: 1,
            bytes: 0,
            total: Some(2),
        };
        assert!(message("x", done, Duration::ZERO).ends_with("0 B of 2 B, 0 B/s"));
    }

    #[test]
    fn nothing_is_drawn_in_the_first_second() {
        let mut bar = Bar::new("x");
        bar.enabled = true;
        bar.last = bar.began.checked_sub(INTERVAL).unwrap();
        bar.update(Progress::default());
        assert!(bar.drawn.is_none());
        bar.began = bar.began.checked_sub(DELAY).unwrap();
        bar.last = bar.last.checked_sub(INTERVAL).unwrap();
        bar.update(Progress::default());
        assert!(bar.drawn.is_some());
    }
}
