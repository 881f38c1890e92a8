//! CPU latency requests, which limit how deep idle CPUs sleep.
//!
//! A process that holds /dev/cpu_dma_latency open requests a maximum wake-up latency in microseconds, and the kernel
//! applies the lowest request (Documentation/power/pm_qos_interface.rst). At zero an idle CPU polls for work instead of
//! sleeping. The request ends when the descriptor is closed, also if the process is killed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// The kernel's default latency, which is no limit (`PM_QOS_CPU_LATENCY_DEFAULT_VALUE`).
const NO_LIMIT: i32 = 2_000_000_000;
/// The maximum number of CPUs. On a larger machine, a request would keep many CPUs awake that no mount uses.
const MAX_CPUS: usize = 8;

/// The outcome of the last attempt of this process to request CPUs that wake up without latency.
static OUTCOME: Mutex<LatencyOutcome> = Mutex::new(LatencyOutcome::NotRequested);

/// The outcome of an attempt to request CPUs that wake up without latency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LatencyOutcome {
    /// There was none: it is not configured, or this machine does not need it.
    #[default]
    NotRequested,
    /// The kernel accepts the request.
    Granted,
    /// The process lacks the permission, or the kernel has refused a change of the request.
    Refused,
}

impl LatencyOutcome {
    /// Returns the outcome in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotRequested => "not requested",
            Self::Granted => "granted",
            Self::Refused => "refused",
        }
    }

    /// Returns the outcome of the last attempt of this process.
    pub fn current() -> Self {
        *OUTCOME.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(self) {
        *OUTCOME.lock().unwrap_or_else(PoisonError::into_inner) = self;
    }
}

/// A request for CPUs that wake up without latency.
#[derive(Debug)]
pub struct LatencyRequest {
    device: File,
    is_active: bool,
}

impl LatencyRequest {
    /// Opens the device, with an inactive request. Fails without the permission to open it.
    pub fn new() -> io::Result<Self> {
        let opened = OpenOptions::new().write(true).open("/dev/cpu_dma_latency");
        let device = opened.inspect_err(|_| LatencyOutcome::Refused.record())?;
        LatencyOutcome::Granted.record();
        Ok(Self {
            device,
            is_active: false,
        })
    }

    /// Keeps idle CPUs awake from here on.
    ///
    /// Only a change costs anything: the kernel wakes up every idle CPU once for it.
    pub fn activate(&mut self) -> io::Result<()> {
        if !self.is_active {
            self.write_limit(0)?;
            self.is_active = true;
        }
        Ok(())
    }

    /// Withdraws the request; the descriptor stays open for the next one.
    pub fn deactivate(&mut self) -> io::Result<()> {
        if self.is_active {
            self.write_limit(NO_LIMIT)?;
            self.is_active = false;
        }
        Ok(())
    }

    fn write_limit(&mut self, microseconds: i32) -> io::Result<()> {
        let written = self.device.write_all(&microseconds.to_ne_bytes());
        written.inspect_err(|_| LatencyOutcome::Refused.record())
    }
}

/// Whether this is a small virtual machine whose idle CPUs halt.
///
/// Waking such a CPU takes an exit to the host.
pub fn is_small_guest_that_halts() -> bool {
    let driver = std::fs::read("/sys/devices/system/cpu/cpuidle/current_driver");
    // Count all CPUs, and not only those in this process's affinity mask: the request affects all of them.
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
    driver.is_ok_and(|name| name.trim_ascii() == b"haltpoll")
        && online.is_ok_and(|cpus| count_cpus(&cpus).is_some_and(|cpus| cpus <= MAX_CPUS))
}

/// Counts the CPUs in a list such as `0-3,8`.
fn count_cpus(list: &str) -> Option<usize> {
    let ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted() {
        assert_eq!(count_cpus("0-1\n"), Some(2));
        assert_eq!(count_cpus("0-3,8,10-11\n"), Some(7));
        for other in ["", "x", "3-1", "0-"] {
            assert_eq!(count_cpus(other), None, "{other}");
        }
    }

    #[test]
    fn a_latency_request_can_be_withdrawn() {
        assert_eq!(LatencyOutcome::current(), LatencyOutcome::NotRequested);
        match LatencyRequest::new() {
            Ok(mut request) => {
                assert_eq!(LatencyOutcome::current(), LatencyOutcome::Granted);
                request.deactivate().unwrap();
                for _ in 0..2 {
                    request.activate().unwrap();
                    assert!(request.is_active);
                }
                request.deactivate().unwrap();
                assert!(!request.is_active);
            }
            // Only root may open the device, and in a container it may be absent or denied.
            Err(error) => {
                assert_eq!(LatencyOutcome::current(), LatencyOutcome::Refused);
                assert!(
                    matches!(
                        error.kind(),
                        io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
                    ),
                    "{error}"
                );
            }
        }
    }
}
