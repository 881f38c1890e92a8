//! How deep the machine's idle CPUs sleep.
//!
//! The rule is the kernel's (Documentation/power/pm_qos_interface.rst): whoever holds /dev/cpu_dma_latency open
//! says how many microseconds a CPU may take to wake up, and the strictest counts. At zero an idle CPU does
//! not sleep: it looks out for work. When the descriptor is closed, also by a kill, the wish is gone.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::thread;

/// What the kernel itself takes for "any".
const ANY: i32 = 2_000_000_000;
/// On a larger machine the CPUs that have nothing to do with a mount would be kept awake for it.
const FEW_CPUS: usize = 8;

/// A wish for CPUs that wake up at once.
#[derive(Debug)]
pub struct Awake {
    device: File,
    wished: bool,
}

impl Awake {
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
    pub fn wish(&mut self, on: bool) -> io::Result<()> {
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
    driver.is_ok_and(|name| name.trim_ascii() == b"haltpoll")
        && thread::available_parallelism().is_ok_and(|cpus| cpus.get() <= FEW_CPUS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_can_be_taken_back() {
        match Awake::new() {
            Ok(mut awake) => {
                for on in [false, true, true, false] {
                    awake.wish(on).unwrap();
                    assert_eq!(awake.wished, on);
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
