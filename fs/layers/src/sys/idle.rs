//! CPU latency requests, which limit how deep idle CPUs sleep.
//!
//! A process that holds /dev/cpu_dma_latency open requests a maximum wake-up latency in microseconds, and the kernel
//! applies the lowest request (Documentation/power/pm_qos_interface.rst). At zero an idle CPU polls for work instead of
//! sleeping. The request ends when the descriptor is closed, also if the process is killed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// The kernel's default latency, which is no limit (`PM_QOS_CPU_LATENCY_DEFAULT_VALUE`).
const ANY: i32 = 2_000_000_000;
/// The maximum number of CPUs. On a larger machine, a request would keep many CPUs awake that no mount uses.
const FEW_CPUS: usize = 8;

/// A request for CPUs that wake up without latency.
#[derive(Debug)]
pub struct Wish {
    device: File,
    active: bool,
}

impl Wish {
    /// Opens the device, with an inactive request. Fails without the permission to open it.
    pub fn new() -> io::Result<Self> {
        let device = OpenOptions::new()
            .write(true)
            .open("/dev/cpu_dma_latency")?;
        Ok(Self {
            device,
            active: false,
        })
    }

    /// Activates or deactivates the request. The kernel wakes up every idle CPU once for each change.
    pub fn be(&mut self, on: bool) -> io::Result<()> {
        if self.active != on {
            let limit: i32 = if on { 0 } else { ANY };
            self.device.write_all(&limit.to_ne_bytes())?;
            self.active = on;
        }
        Ok(())
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
        && online.is_ok_and(|cpus| count(&cpus).is_some_and(|cpus| cpus <= FEW_CPUS))
}

/// Counts the CPUs in a list such as `0-3,8`.
fn count(list: &str) -> Option<usize> {
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
        assert_eq!(count("0-1\n"), Some(2));
        assert_eq!(count("0-3,8,10-11\n"), Some(7));
        for other in ["", "x", "3-1", "0-"] {
            assert_eq!(count(other), None, "{other}");
        }
    }

    #[test]
    fn a_wish_can_be_taken_back() {
        match Wish::new() {
            Ok(mut wish) => {
                for on in [false, true, true, false] {
                    wish.be(on).unwrap();
                    assert_eq!(wish.active, on);
                }
            }
            // Only root may open the device, and in a container it may be absent or denied.
            Err(error) => assert!(
                matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound
                ),
                "{error}"
            ),
        }
    }
}
