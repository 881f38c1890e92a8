//! Random numbers of the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Errno, Error, Result};

/// Returns a random number of 128 bits.
pub fn number() -> Result<u128> {
    let mut bytes = [0; 16];
    // Up to 256 bytes are never read in part.
    match getrandom(&mut bytes, GetRandomFlags::empty())? {
        16 => Ok(u128::from_ne_bytes(bytes)),
        _ => Err(Error::Errno(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_numbers_differ() {
        assert_ne!(super::number().unwrap(), super::number().unwrap());
    }
}
