//! How deep the machine's idle CPUs sleep.
//!
//! The rule is the kernel's (Documentation/power/pm_qos_interface.rst): whoever holds /dev/cpu_dma_latency open
//! says how many microseconds a CPU may take to wake up, and the strictest counts. At zero an idle CPU does
//! not sleep: it looks out for work. When the descriptor is closed, also by a kill, the wish is gone.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// What the kernel itself takes for "any".
const ANY: i32 = 2_000_000_000;
/// On a larger machine the CPUs that have nothing to do with a mount would be kept awake for it.
const FEW_CPUS: usize = 8;

/// A wish for CPUs that wake up at once.
#[derive(Debug)]
pub struct Wish {
    device: File,
    wished: bool,
}

impl Wish {
    /// Wishes nothing yet. Fails where this process may not wish.
    pub fn new() -> io::Result<Self> {
        let device = OpenOptions::new()
            .write(true)
            .open("/dev/cpu_dma_latency")?;
        Ok(Self {
            device,
            wished: false,
        })
    }

    /// Wishes it, or no longer. Every idle CPU is woken up once for a change.
    pub fn be(&mut self, on: bool) -> io::Result<()> {
        if self.wished != on {
            let most: i32 = if on { 0 } else { ANY };
            self.device.write_all(&most.to_ne_bytes())?;
            self.wished = on;
        }
        Ok(())
    }
}

/// Whether this is a virtual machine whose idle CPUs halt, so that a wake-up goes by way of the host, and a
/// small one.
pub fn is_small_guest_that_halts() -> bool {
    let driver = std::fs::read("/sys/devices/system/cpu/cpuidle/current_driver");
    // Those of the machine, and not only those that this process may run on: the wish is for all.
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
    driver.is_ok_and(|name| name.trim_ascii() == b"haltpoll")
        && online.is_ok_and(|cpus| count(&cpus).is_some_and(|cpus| cpus <= FEW_CPUS))
}

/// How many numbers a list like `0-3,8` names.
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
                    assert_eq!(wish.wished, on);
                }
            }
            // Nobody but root may, and in a container not even root can.
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
