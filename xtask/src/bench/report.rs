//! Formats a comparison: on the terminal while it runs, and in docs/benchmarks.md between two marker comments. Text
//! outside the markers is retained.

use std::fmt::Write;
use std::path::Path;

use super::outcome::{Line, Outcome, Told};
use super::plot;
use super::rows::Group;
use super::variants::REFERENCE;
use crate::run::{Failure, Result, failure, note, root};

const BEGIN: &str = "<!-- written by `cargo xtask bench`: begin -->";
const END: &str = "<!-- written by `cargo xtask bench`: end -->";

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

/// Writes docs/benchmarks.md and the charts.
pub(super) fn write(outcome: &Outcome) -> Result<()> {
    write_in(outcome, &root()?.join("docs"))
}

/// Writes the page and the charts into the directory `docs`.
pub(super) fn write_in(outcome: &Outcome, docs: &Path) -> Result<()> {
    let page = docs.join("benchmarks.md");
    let pictures = docs.join("bench");
    std::fs::create_dir_all(&pictures)?;
    for group in Group::ALL {
        let (title, file) = group.names();
        plot::draw(outcome, group, title, &pictures.join(format!("{file}.svg")))?;
    }
    let old = std::fs::read_to_string(&page)?;
    let new = replace_between_markers(&old, &generated(outcome)).ok_or_else(|| {
        Failure(format!(
            "{} lacks the markers {BEGIN} and {END}",
            page.display()
        ))
    })?;
    std::fs::write(&page, new)?;
    note(&format!(
        "{} and docs/bench have been written",
        page.display()
    ));
    match outcome.lines.is_empty() {
        true => failure("there are no results to write"),
        false => Ok(()),
    }
}

/// Replaces the text between the markers of a page; returns None if a marker is missing.
fn replace_between_markers(page: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{text}\n{END}{after}"))
}

fn generated(outcome: &Outcome) -> String {
    let mut text = overview(outcome);
    for group in Group::ALL {
        let lines: Vec<_> = outcome.lines.iter().filter(|l| l.group == group).collect();
        if !lines.is_empty() {
            text += &table(outcome, group, &lines);
        }
    }
    text += &requests(outcome);
    text += &memory(outcome);
    text
}

/// Returns the description of the machine and the run, and the table of geometric means.
fn overview(outcome: &Outcome) -> String {
    let machine = &outcome.machine;
    let mut text = format!(
        "{date}, {cpus} CPUs ({cpu}), {memory} GiB, {kernel}, fuse-overlayfs {peer}, cowl {commit}; {ground}; \
         load average at the start {load}.\n{files} files, {big} MiB in the big ones; {rounds} round(s), medians, \
         minimum and maximum in parentheses. All values but the first column are ratios to the kernel's overlayfs \
         with its defaults, in the same run: smaller is faster.\n\n",
        date = machine.date,
        cpus = machine.cpus,
        cpu = machine.cpu,
        memory = machine.memory_gib,
        kernel = machine.kernel,
        peer = machine.fuse_overlayfs,
        commit = machine.commit,
        ground = outcome.ground,
        load = machine.load,
        files = outcome.files,
        big = outcome.big_mib,
        rounds = outcome.rounds,
    );
    text += "| | options | geometric mean | rows |\n|---|---|---|---|\n";
    for variant in &outcome.variants {
        let options = match variant.options.as_str() {
            "" => "defaults".to_owned(),
            options => format!("`{options}`"),
        };
        let name = &variant.name;
        let mean = match (&variant.refused, outcome.mean(name)) {
            (Some(error), _) => format!("**not mounted**: {} | ", error.replace(['|', '\n'], " ")),
            (None, Some((mean, rows))) => format!("{mean:.2} | {rows}"),
            (None, None) => "- | 0".to_owned(),
        };
        write_to(&mut text, format_args!("| {name} | {options} | {mean} |\n"));
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

    #[test]
    fn only_the_text_between_the_markers_is_replaced() {
        let page = format!("above\n{BEGIN}\nold\n{END}\nbelow\n");
        let new = replace_between_markers(&page, "new\n").unwrap();
        assert_eq!(new, format!("above\n{BEGIN}\n\nnew\n\n{END}\nbelow\n"));
        assert_eq!(replace_between_markers(&new, "new\n").unwrap(), new);
        assert!(replace_between_markers("no marks", "new").is_none());
    }

    #[test]
    fn the_page_contains_the_markers() {
        let page = std::fs::read_to_string(root().unwrap().join("docs/benchmarks.md")).unwrap();
        assert!(replace_between_markers(&page, "").is_some());
    }
}
