//! The version of the running kernel.

/// Returns the version of the running kernel.
pub fn version() -> (u32, u32, u32) {
    parse(&rustix::system::uname().release().to_string_lossy())
}

/// Returns the first three numbers of a release of the kernel, each of which is 0 if it is missing.
pub fn parse(release: &str) -> (u32, u32, u32) {
    let mut numbers = release
        .split(|digit: char| !digit.is_ascii_digit())
        .map(|digits| digits.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_parsed() {
        for (release, version) in [
            ("6.18.44-fc-v769", (6, 18, 44)),
            ("6.12.65+deb13", (6, 12, 65)),
            ("5.10-arch", (5, 10, 0)),
            ("6.19-rc1", (6, 19, 0)),
            ("generic", (0, 0, 0)),
            ("", (0, 0, 0)),
        ] {
            assert_eq!(parse(release), version, "{release}");
        }
    }
}
