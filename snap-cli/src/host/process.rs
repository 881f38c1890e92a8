//! The ancestors of this process.

/// Returns whether a process with this program name is an ancestor of this process.
pub fn is_descendant_of(program: &str) -> bool {
    let mut pid = std::process::id().to_string();
    // The limit prevents an endless loop if process ids are reused during the walk.
    for _ in 0..64 {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            return false;
        };
        let Some((name, parent)) = parse(&stat) else {
            return false;
        };
        if name == program {
            return true;
        }
        if parent == "0" {
            return false;
        }
        pid = parent.to_owned();
    }
    false
}

/// Returns the name and the parent of a process from /proc/PID/stat. The name may contain any character, including
/// parentheses.
fn parse(stat: &str) -> Option<(&str, &str)> {
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    let name = stat.get(start + 1..end)?;
    let mut fields = stat.get(end + 1..)?.split_ascii_whitespace();
    fields.next()?;
    Some((name, fields.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_names_and_parents() {
        assert_eq!(parse("12 (a b) c) S 7 12"), Some(("a b) c", "7")));
        assert_eq!(parse("12"), None);
        assert!(!is_descendant_of("no such program"));
    }
}
