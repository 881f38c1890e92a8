//! The fuzz target for mount options. See [`cowl_layers::fuzzing`].

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use super::{Args, Invocation};

/// Parses the text of one `-o`.
///
/// No path is empty, and there are not more layers than separators. The layers survive a round trip.
pub fn options(data: &[u8]) {
    let Ok(parsed) = parse(data.to_vec()) else {
        return;
    };
    let config = &parsed.config;
    let (upper, work) = match &config.upper {
        Some((upper, work)) => (Some(upper), Some(work)),
        None => (None, None),
    };
    let lowers = || config.lowers.iter().chain(&config.data_only);
    let paths = || lowers().chain(upper).chain(work).chain(&config.control);
    assert!(paths().all(|path| !path.as_os_str().is_empty()));
    assert!(paths().count() <= data.len());
    if parsed.remount {
        return;
    }
    let mut text = b"lowerdir=".to_vec();
    let join = |paths: &[std::path::PathBuf], separator: &[u8]| {
        let escaped: Vec<Vec<u8>> = paths.iter().map(|path| escape(path)).collect();
        escaped.join(separator)
    };
    text.extend(join(&config.lowers, b":"));
    for path in &config.data_only {
        text.extend([b"::".as_slice(), &escape(path)].concat());
    }
    for (key, path) in [("upperdir", upper), ("workdir", work)] {
        if let Some(path) = path {
            text.extend([b",", key.as_bytes(), b"=", &escape(path)].concat());
        }
    }
    let again = parse(text).map(|again| again.config);
    let again = again.as_ref().map(|config| {
        let (lowers, data_only) = (&config.lowers, &config.data_only);
        (lowers, data_only, &config.upper)
    });
    assert_eq!(
        again,
        Ok((&config.lowers, &config.data_only, &config.upper))
    );
}

fn parse(text: Vec<u8>) -> Result<Invocation, String> {
    let args = Args {
        options: vec![OsString::from_vec(text)],
        foreground: false,
        debug: false,
        upgrade: None,
        take_over: false,
        paths: vec!["/mnt".into()],
    };
    args.into_invocation()
}

/// Escapes a path for any of the options.
fn escape(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    for &byte in path.as_os_str().as_bytes() {
        if b"\\,:".contains(&byte) {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_is_replayed() {
        cowl_layers::fuzzing::replay("options", super::options);
    }
}
