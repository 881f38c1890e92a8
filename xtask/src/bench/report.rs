//! Formats a comparison: on the terminal while it runs, and in docs/benchmarks.md and README.md between marker comments.
//! Text outside the markers is retained.

use std::fmt::Write;
use std::path::Path;

use super::outcome::{Comparison, Line, Outcome, Told};
use super::plot;
use super::rows::Group;
use super::variants::REFERENCE;
use crate::run::{Failure, Result, failure, note, root};

/// Name of the markers in README.md.
const QUOTED: &str = "report";

/// Returns the header of the table on the terminal.
pub(super) fn head(variants: &[Told]) -> String {
    let mut text = format!("{:24}{:>11}", "", format!("{REFERENCE}, s"));
    for variant in others(variants) {
        write_to(&mut text, format_args!("{:>26}", variant.name));
    }
    text
}

fn others(variants: &[Told]) -> impl Iterator<Item = &Told> {
    let mounted = variants.iter().filter(|variant| variant.refused.is_none());
    mounted.filter(|variant| variant.name != REFERENCE)
}

/// Returns a row of the table on the terminal: ratios to the kernel's overlayfs with minimum and maximum, and requests
/// per unit.
pub(super) fn line(line: &Line, variants: &[Told]) -> String {
    let reference = line.cells.get(REFERENCE).and_then(|cell| cell.spread());
    let mut text = match reference {
        Some([median, ..]) => format!("{:24}{median:11.4}", line.name),
        None => format!("{:24}{:>11}", line.name, "failed"),
    };
    for variant in others(variants) {
        let mut cell = ratio(line, &variant.name, true);
        if let Some(requests) = line.requests(&variant.name) {
            write_to(&mut cell, format_args!(" {requests:.2}r"));
        }
        write_to(&mut text, format_args!("{cell:>26}"));
    }
    text
}

/// Appends formatted text; writing to a string does not fail.
fn write_to(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    if text.write_fmt(arguments).is_err() {
        text.push('?');
    }
}

fn ratio(line: &Line, name: &str, spread: bool) -> String {
    match (line.ratio(name), line.cells.get(name)) {
        (Some([median, least, most]), _) if spread => format!("{median:.2} ({least:.2}-{most:.2})"),
        (Some([median, ..]), _) => format!("{median:.2}"),
        (None, Some(cell)) if cell.error.is_some() => "FAILED".to_owned(),
        (None, _) => "-".to_owned(),
    }
}

/// Returns the summary that is printed at the end of a run.
pub(super) fn summary(outcome: &Outcome) -> String {
    let mut text = String::from("\ngeometric means (kernel overlayfs = 1):");
    for name in outcome.compared() {
        if let Some((mean, rows)) = outcome.mean(name) {
            write_to(
                &mut text,
                format_args!("\n  {name}: {mean:.2} over {rows} rows"),
            );
        }
    }
    for (name, [first, second]) in &outcome.page_cache {
        write_to(
            &mut text,
            format_args!(
                "\npage cache of one library of {} MiB, {name}: {} MiB, and {} more for the second reader",
                outcome.big_mib,
                first >> 20,
                second >> 20
            ),
        );
    }
    for variant in &outcome.variants {
        if let Some(error) = &variant.refused {
            write_to(
                &mut text,
                format_args!("\n!! {} was LEFT OUT: {error}", variant.name),
            );
        }
    }
    text
}

/// Writes the last complete run of each benchmark into the documentation.
pub(super) fn write_kept() -> Result<()> {
    let mut written = false;
    for comparison in [Comparison::Mounted, Comparison::Work] {
        match Outcome::kept(comparison)? {
            Some(outcome) => {
                write(comparison, &outcome)?;
                written = true;
            }
            None => note(&format!(
                "there are no results of `cargo xtask bench {}`",
                comparison.name()
            )),
        }
    }
    match written {
        true => Ok(()),
        false => failure("there are no results to write"),
    }
}

/// Writes docs/benchmarks.md and its charts, and the quoted results in README.md.
pub(super) fn write(comparison: Comparison, outcome: &Outcome) -> Result<()> {
    let root = root()?;
    write_in(comparison, outcome, &root.join("docs"))?;
    match comparison {
        Comparison::Mounted => Ok(()),
        Comparison::Work => replace(&root.join("README.md"), QUOTED, &quoted(outcome)),
    }
}

/// Writes the page and the charts into the directory `docs`.
pub(super) fn write_in(comparison: Comparison, outcome: &Outcome, docs: &Path) -> Result<()> {
    if outcome.lines.is_empty() {
        return failure("there are no results to write");
    }
    let pictures = docs.join("bench");
    std::fs::create_dir_all(&pictures)?;
    for group in comparison.groups() {
        let (title, file) = group.names();
        plot::draw(
            outcome,
            *group,
            title,
            &pictures.join(format!("{file}.svg")),
        )?;
    }
    let page = docs.join("benchmarks.md");
    replace(&page, comparison.name(), &generated(comparison, outcome))?;
    note(&format!(
        "{} and docs/bench have been written",
        page.display()
    ));
    Ok(())
}

/// Replaces the text between the markers `name` of a page.
fn replace(page: &Path, name: &str, text: &str) -> Result<()> {
    let old = std::fs::read_to_string(page)?;
    let new = replace_between_markers(&old, name, text).ok_or_else(|| {
        let [begin, end] = markers(name);
        Failure(format!(
            "{} lacks the markers {begin} and {end}",
            page.display()
        ))
    })?;
    std::fs::write(page, new)?;
    Ok(())
}

fn markers(name: &str) -> [String; 2] {
    ["begin", "end"].map(|end| format!("<!-- written by `cargo xtask bench {name}`: {end} -->"))
}

/// Replaces the text between the markers `name`; returns None if a marker is missing.
fn replace_between_markers(page: &str, name: &str, text: &str) -> Option<String> {
    let [begin, end] = markers(name);
    let (before, rest) = page.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n\n{text}\n{end}{after}"))
}

/// Returns the table of README.md: the work of a container, without the variants of cowlfs that no user has.
fn quoted(outcome: &Outcome) -> String {
    const NAMES: [(&str, &str); 2] = [("native", "plain directory"), ("managed", "cowl")];
    let present = |name: &str| outcome.compared().any(|other| other == name);
    let names: Vec<_> = NAMES.iter().filter(|(name, _)| present(name)).collect();
    let titles: Vec<_> = names.iter().map(|(_, title)| *title).collect();
    let mut text = format!(
        "| | kernel overlayfs, s | {} |\n|---|---|{}\n",
        titles.join(" | "),
        "---|".repeat(names.len())
    );
    for line in &outcome.lines {
        let reference = line.cells.get(REFERENCE).and_then(|cell| cell.spread());
        let reference = reference.map_or_else(
            || "failed".to_owned(),
            |[median, ..]| format!("{median:.2}"),
        );
        let cells: Vec<_> = names
            .iter()
            .map(|(name, _)| ratio(line, name, false))
            .collect();
        write_to(
            &mut text,
            format_args!("| {} | {reference} | {} |\n", line.name, cells.join(" | ")),
        );
    }
    let machine = &outcome.machine;
    write_to(
        &mut text,
        format_args!(
            "\n{} CPUs ({}), {}, cowl {}, {}\n",
            machine.cpus, machine.cpu, machine.kernel, machine.commit, machine.date
        ),
    );
    text
}

fn generated(comparison: Comparison, outcome: &Outcome) -> String {
    let mut text = overview(comparison, outcome);
    for group in comparison.groups() {
        let lines: Vec<_> = outcome.lines.iter().filter(|l| l.group == *group).collect();
        if !lines.is_empty() {
            text += &table(outcome, *group, &lines);
        }
    }
    text += &requests(outcome);
    text += &memory(outcome);
    text
}

/// Returns the description of the machine and the run, and the table of geometric means.
fn overview(comparison: Comparison, outcome: &Outcome) -> String {
    let machine = &outcome.machine;
    let (files, mib) = (outcome.files, outcome.big_mib);
    let halt_poll = match &machine.halt_poll {
        Some(nanoseconds) => format!(" (guest_halt_poll_ns {nanoseconds})"),
        None => String::new(),
    };
    let mut text = format!(
        "{date}, {cpus} CPUs ({cpu}), cpuidle driver {cpuidle}{halt_poll}, {memory} GiB, {kernel}, fuse-overlayfs \
         {peer}, cowl {commit}; {ground}; load average at the start {load}.\n{size}; {rounds} round(s), medians, \
         minimum and maximum in parentheses. All values but the first column are ratios to the kernel's overlayfs \
         with its defaults, in the same run: smaller is faster.\n\n",
        date = machine.date,
        cpus = machine.cpus,
        cpu = machine.cpu,
        cpuidle = machine.cpuidle,
        memory = machine.memory_gib,
        kernel = machine.kernel,
        peer = machine.fuse_overlayfs,
        commit = machine.commit,
        ground = outcome.ground,
        load = machine.load,
        size = match comparison {
            Comparison::Mounted => format!("{files} files, {mib} MiB in the big ones"),
            Comparison::Work => format!("A root filesystem of {files} objects and {mib} MiB"),
        },
        rounds = outcome.rounds,
    );
    text += "| | options | idle CPUs kept awake | geometric mean | rows |\n|---|---|---|---|---|\n";
    for variant in &outcome.variants {
        let options = match variant.options.as_str() {
            "" => "defaults".to_owned(),
            options => format!("`{options}`"),
        };
        let name = &variant.name;
        let awake = variant.awake.as_deref().unwrap_or("-");
        let mean = match (&variant.refused, outcome.mean(name)) {
            (Some(error), _) => format!("**not mounted**: {} | ", error.replace(['|', '\n'], " ")),
            (None, Some((mean, rows))) => format!("{mean:.2} | {rows}"),
            (None, None) => "- | 0".to_owned(),
        };
        write_to(
            &mut text,
            format_args!("| {name} | {options} | {awake} | {mean} |\n"),
        );
    }
    text
}

fn table(outcome: &Outcome, group: Group, lines: &[&Line]) -> String {
    let (title, file) = group.names();
    let names: Vec<&str> = outcome.compared().collect();
    let mut text = format!(
        "\n### {title}\n\n![{title}, as ratios to the kernel's overlayfs](bench/{file}.svg)\n\n\
         | | kernel, ms | {} |\n|---|---|{}\n",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for line in lines {
        let reference = line.cells.get(REFERENCE).and_then(|cell| cell.spread());
        let reference = reference.map_or_else(
            || "failed".to_owned(),
            |[median, ..]| format!("{:.1}", median * 1000.0),
        );
        let spread = outcome.rounds > 1;
        let cells: Vec<_> = names.iter().map(|name| ratio(line, name, spread)).collect();
        write_to(
            &mut text,
            format_args!("| {} | {reference} | {} |\n", line.name, cells.join(" | ")),
        );
    }
    text
}

/// Returns the table of requests per unit, for the file systems whose daemons report them.
fn requests(outcome: &Outcome) -> String {
    let names: Vec<&str> = outcome
        .compared()
        .filter(|name| {
            outcome
                .lines
                .iter()
                .any(|line| line.requests(name).is_some())
        })
        .collect();
    let Some(first) = names.first() else {
        return String::new();
    };
    let mut text = format!(
        "\n### Requests\n\nNumber of requests from the kernel to the daemon per unit of work; the kinds are those of \
         {first}.\n\n| | unit | {} | by kind |\n|---|---|{}---|\n",
        names.join(" | "),
        "---|".repeat(names.len())
    );
    for line in &outcome.lines {
        let counts: Vec<_> = names.iter().map(|name| line.requests(name)).collect();
        if counts.iter().all(Option::is_none) {
            continue;
        }
        let counts = counts.iter().map(|count| match count {
            Some(count) => format!("{count:.2}"),
            None => "0".to_owned(),
        });
        let counts = counts.collect::<Vec<_>>().join(" | ");
        let mut kinds: Vec<_> = line
            .cells
            .get(*first)
            .into_iter()
            .flat_map(|cell| &cell.requests)
            .map(|(kind, count)| (kind, *count as f64 / line.units.max(1) as f64))
            .filter(|(_, count)| *count >= 0.005)
            .collect();
        kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
        let kinds: Vec<_> = kinds
            .iter()
            .map(|(kind, count)| format!("{kind} {count:.2}"))
            .collect();
        write_to(
            &mut text,
            format_args!(
                "| {} | {} | {counts} | {} |\n",
                line.name,
                line.unit,
                kinds.join(", ")
            ),
        );
    }
    text
}

fn memory(outcome: &Outcome) -> String {
    let mut text = String::new();
    if !outcome.memory.is_empty() {
        text += "\n### Memory\n\n| | inodes known | bytes of the daemon's memory per inode |\n|---|---|---|\n";
        for (name, (inodes, bytes)) in &outcome.memory {
            let per_inode = bytes / inodes.max(&1);
            write_to(
                &mut text,
                format_args!("| {name} | {inodes} | {per_inode} |\n"),
            );
        }
    }
    if !outcome.page_cache.is_empty() {
        let big = outcome.big_mib;
        write_to(
            &mut text,
            format_args!(
                "\nTwo mounts of the same layers, as two containers have them, read the same library of {big} \
                 MiB:\n\n| | page cache after the first, MiB | increase by the second, MiB |\n|---|---|---|\n"
            ),
        );
        for (name, [first, second]) in &outcome.page_cache {
            let (first, second) = (first >> 20, second >> 20);
            write_to(&mut text, format_args!("| {name} | {first} | {second} |\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    use std::collections::BTreeMap;

    use super::super::machine::Machine;
    use super::super::outcome::Cell;

    fn outcome() -> Outcome {
        let told = |name: &str, refused: Option<&str>, awake: Option<&str>| Told {
            name: name.to_owned(),
            options: String::new(),
            refused: refused.map(str::to_owned),
            awake: awake.map(str::to_owned),
        };
        let cell = |seconds: f64| Cell {
            seconds: vec![seconds],
            ..Cell::default()
        };
        let cells = [(REFERENCE, 2.0), ("native", 1.0), ("managed", 3.0)];
        Outcome {
            machine: Machine {
                cpuidle: "haltpoll".to_owned(),
                halt_poll: Some("200000".to_owned()),
                ..Machine::default()
            },
            ground: "ext4".to_owned(),
            rounds: 1,
            files: 7,
            big_mib: 9,
            variants: vec![
                told("native", None, None),
                told(REFERENCE, None, None),
                told("managed", None, Some("granted")),
                told("rootless", Some("no | user namespace"), None),
            ],
            lines: vec![Line {
                name: "make".to_owned(),
                group: Group::Work,
                unit: "time".to_owned(),
                units: 1,
                cells: cells
                    .map(|(name, seconds)| (name.to_owned(), cell(seconds)))
                    .into(),
            }],
            memory: BTreeMap::new(),
            page_cache: BTreeMap::new(),
        }
    }

    #[test]
    fn a_column_that_could_not_be_mounted_is_reported_with_its_reason() {
        let text = generated(Comparison::Work, &outcome());
        for line in [
            "cpuidle driver haltpoll (guest_halt_poll_ns 200000)",
            "A root filesystem of 7 objects and 9 MiB",
            "| rootless | defaults | - | **not mounted**: no   user namespace |  |",
            "| managed | defaults | granted | 1.50 | 1 |",
            "| | kernel, ms | native | managed |",
            "| make | 2000.0 | 0.50 | 1.50 |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(head(&outcome().variants).ends_with("managed"));
    }

    #[test]
    fn the_readme_quotes_managed_mounts() {
        let text = quoted(&outcome());
        assert!(
            text.contains("| | kernel overlayfs, s | plain directory | cowl |"),
            "{text}"
        );
        assert!(text.contains("| make | 2.00 | 0.50 | 1.50 |"), "{text}");
    }

    #[test]
    fn only_the_text_between_the_markers_is_replaced() {
        let [begin, end] = markers("work");
        let page = format!("above\n{begin}\nold\n{end}\nbelow\n");
        let new = replace_between_markers(&page, "work", "new\n").unwrap();
        assert_eq!(new, format!("above\n{begin}\n\nnew\n\n{end}\nbelow\n"));
        assert_eq!(replace_between_markers(&new, "work", "new\n").unwrap(), new);
        assert!(replace_between_markers(&page, "mounted", "new").is_none());
    }

    #[test]
    fn the_pages_contain_the_markers() {
        let root = root().unwrap();
        for (page, name) in [
            ("docs/benchmarks.md", "mounted"),
            ("docs/benchmarks.md", "work"),
            ("README.md", QUOTED),
        ] {
            let text = std::fs::read_to_string(root.join(page)).unwrap();
            assert!(
                replace_between_markers(&text, name, "").is_some(),
                "{page}, {name}"
            );
        }
    }
}
