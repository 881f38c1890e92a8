//! Which programs this process was started by.

/// Whether a program of this name is among the processes that this one was started by.
pub fn is_below(program: &str) -> bool {
    let mut pid = std::process::id().to_string();
    // As many as there ever are, lest two look-ups of a changing tree lead in a circle.
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

/// Name and parent of a process, by /proc/PID/stat. The name may hold anything, parentheses too.
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
    fn names_and_parents() {
        assert_eq!(parse("12 (a b) c) S 7 12"), Some(("a b) c", "7")));
        assert_eq!(parse("12"), None);
        assert!(!is_below("no such program"));
    }
}
