//! Generates the terminal transcript of the README: runs commands on a Debian root filesystem, and writes their output
//! with times as Markdown and as an animated SVG.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cowl_tests::rootfs;
use cowl_tests::scratch::Scratch;

use crate::run::{Failure, Result, Run, note, root, target};

/// Maximum number of output lines per command; of longer output, the last lines are shown.
const SHOWN: usize = 3;

/// Command lines, without the prompt `#`. `cowl` is the program that was built.
const SCRIPT: [&str; 7] = [
    "cowl snapshot web -m 'before the upgrade'",
    "cowl exec web -- apt-get -qq -y --allow-remove-essential purge coreutils",
    "cowl exec web -- ls /",
    "cowl diff web@snap0 web | wc -l",
    "cowl restore web snap0",
    "cowl exec web -- ls --version | head -n 1",
    "cowl list web",
];

/// One command with its output.
struct Step {
    line: &'static str,
    output: Vec<String>,
    took: Duration,
}

/// Runs the commands, writes `docs/transcript.svg`, and replaces the transcript in the README.
pub(crate) fn run() -> Result<()> {
    crate::namespace::enter();
    crate::setup::run()?;
    Run::cargo()?
        .args(["build", "--release", "--locked", "--bins", "-p", "cowl"])
        .run()?;
    let tar = rootfs::debian_tar().map_err(|error| Failure(error.to_string()))?;
    let scratch = Scratch::new("transcript");
    let environment = Environment {
        programs: target()?.join("release"),
        store: scratch.join("store"),
    };
    let create = format!("cowl create web --from {}", tar.display());
    environment.shell(&create)?;
    environment.shell("cowl mount web")?;
    let steps: Result<Vec<Step>> = SCRIPT.iter().map(|line| environment.step(line)).collect();
    environment.shell("cowl umount web")?;
    let steps = steps?;
    let markdown = markdown(&steps);
    note(&markdown);
    std::fs::write(root()?.join("docs/transcript.svg"), svg(&steps)?)?;
    replace_in_readme(&markdown)
}

struct Environment {
    programs: PathBuf,
    store: PathBuf,
}

impl Environment {
    /// Runs a line in a shell whose PATH begins with the directory of the built programs. Returns its combined standard
    /// output and error, and the elapsed time.
    fn shell(&self, line: &str) -> Result<(String, Duration)> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let others = std::env::split_paths(&path);
        let paths = std::env::join_paths(std::iter::once(self.programs.clone()).chain(others))
            .map_err(|error| Failure(error.to_string()))?;
        let start = Instant::now();
        let output = Command::new("bash")
            .args(["-c", &format!("{{ {line}\n}} 2>&1")])
            .env("PATH", paths)
            .env("COWL_STORE", &self.store)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .output()?;
        let took = start.elapsed();
        let text = String::from_utf8(output.stdout)
            .map_err(|error| Failure(format!("{line}: {error}")))?;
        Ok((text, took))
    }

    fn step(&self, line: &'static str) -> Result<Step> {
        let (text, took) = self.shell(line)?;
        let all: Vec<_> = text.lines().map(str::to_owned).collect();
        let output = all.iter().skip(all.len().saturating_sub(SHOWN)).cloned();
        Ok(Step {
            line,
            output: output.collect(),
            took,
        })
    }
}

/// Returns the time of a `cowl` command. The time of a program that runs in the container is not shown.
fn time(step: &Step) -> Option<String> {
    let is_program = step.line.contains(" exec ") || step.line.contains('|');
    (!is_program).then(|| format!("{} ms", step.took.as_millis()))
}

fn markdown(steps: &[Step]) -> String {
    let mut text = String::from("```console\n");
    for step in steps {
        let command = format!("# {}", step.line);
        match time(step) {
            Some(time) => text.push_str(&format!("{command:<78}  {time:>6}\n")),
            None => text.push_str(&format!("{command}\n")),
        }
        step.output
            .iter()
            .for_each(|line| text.push_str(&format!("{line}\n")));
    }
    text.push_str("```\n");
    text
}

/// Returns an SVG image of a terminal in which the lines appear one after another.
fn svg(steps: &[Step]) -> Result<String> {
    const LINE: usize = 20;
    let mut rows = Vec::new();
    let mut delay = 0.5;
    for step in steps {
        rows.push((delay, "c", format!("# {}", step.line), time(step)));
        delay += 0.8;
        for line in &step.output {
            rows.push((delay, "o", line.clone(), None));
        }
        delay += 0.9;
    }
    let height = rows.len() * LINE + 28;
    let mut out = String::new();
    let failed = |error: std::fmt::Error| Failure(error.to_string());
    write!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"820\" height=\"{height}\" \
         font-family=\"ui-monospace,monospace\" font-size=\"14\">\n<style>\
         text{{opacity:0;animation:a .1s forwards;white-space:pre}}.c{{fill:#fff;font-weight:bold}}\
         .o{{fill:#b8c4ce}}.t{{fill:#7ee787}}@keyframes a{{to{{opacity:1}}}}</style>\n\
         <rect width=\"820\" height=\"{height}\" rx=\"8\" fill=\"#14181d\"/>\n"
    )
    .map_err(failed)?;
    for (index, (delay, class, line, time)) in rows.iter().enumerate() {
        let y = (index + 1) * LINE + 10;
        let text = escape(line);
        writeln!(
            out,
            "<text class=\"{class}\" x=\"16\" y=\"{y}\" style=\"animation-delay:{delay:.1}s\">{text}</text>"
        )
        .map_err(failed)?;
        if let Some(time) = time {
            let later = delay + 0.5;
            writeln!(
                out,
                "<text class=\"t\" x=\"804\" y=\"{y}\" text-anchor=\"end\" \
                 style=\"animation-delay:{later:.1}s\">{time}</text>"
            )
            .map_err(failed)?;
        }
    }
    out.push_str("</svg>\n");
    Ok(out)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Replaces the text between the two marker comments in the README.
fn replace_in_readme(markdown: &str) -> Result<()> {
    const BEGIN: &str = "<!-- written by `cargo xtask transcript`: begin -->\n";
    const END: &str = "<!-- written by `cargo xtask transcript`: end -->";
    let path = root()?.join("README.md");
    let page = std::fs::read_to_string(&path)?;
    let (before, rest) = page.split_once(BEGIN).ok_or_else(|| {
        Failure("README.md lacks the comment at the beginning of the transcript".to_owned())
    })?;
    let (_, after) = rest.split_once(END).ok_or_else(|| {
        Failure("README.md lacks the comment at the end of the transcript".to_owned())
    })?;
    std::fs::write(&path, format!("{before}{BEGIN}\n{markdown}\n{END}{after}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transcript_contains_only_times_of_cowl() {
        let steps = [
            Step {
                line: "cowl snapshot web",
                output: vec!["snap0".to_owned()],
                took: Duration::from_millis(7),
            },
            Step {
                line: "cowl exec web -- true",
                output: Vec::new(),
                took: Duration::from_secs(3),
            },
        ];
        let text = markdown(&steps);
        assert!(
            text.contains("7 ms\nsnap0\n# cowl exec web -- true\n"),
            "{text}"
        );
        assert!(svg(&steps).unwrap().contains(">7 ms</text>"));
    }

    #[test]
    fn the_readme_has_the_transcript_markers() {
        let page = std::fs::read_to_string(root().unwrap().join("README.md")).unwrap();
        assert_eq!(page.matches("cargo xtask transcript").count(), 2);
    }
}
