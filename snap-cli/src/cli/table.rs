//! Tables with aligned columns. Colors in cells have no width.

use console::measure_text_width;

use super::output::{Color, escape_cell, paint, print_line};
use crate::error::Result;

/// Options of commands that print a table.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Style {
    /// Omit the header line
    #[arg(long)]
    pub(super) no_header: bool,
}

impl Style {
    /// Prints a table; the columns with an index in `right` are right-aligned.
    pub(super) fn print(
        self,
        header: &[&str],
        rows: Vec<Vec<String>>,
        right: &[usize],
    ) -> Result<()> {
        print_table(if self.no_header { &[] } else { header }, rows, right)
    }
}

/// Prints a table; the columns with an index in `right` are right-aligned. Without names, `header` prints no line.
pub(super) fn print_table(header: &[&str], rows: Vec<Vec<String>>, right: &[usize]) -> Result<()> {
    let names = header.iter().map(|name| paint(Color::Bold, name));
    let first: Option<Vec<String>> = (!header.is_empty()).then(|| names.collect());
    let rows = first.into_iter().chain(rows);
    let rows = rows.map(|row| row.iter().map(|cell| escape_cell(cell)).collect());
    align(&rows.collect::<Vec<_>>(), right)
        .iter()
        .try_for_each(|text| print_line(text))
}

/// Formats each row as a line.
fn align(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| measure_text_width(cell))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let row = |cells: &Vec<String>| {
        let mut text = String::new();
        for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let gap = " ".repeat(width.saturating_sub(measure_text_width(cell)));
            let (before, after) = match right.contains(&column) {
                true => (gap.as_str(), ""),
                false => ("", gap.as_str()),
            };
            let between = if column == 0 { "" } else { "  " };
            text.extend([between, before, cell, after]);
        }
        text.trim_end().to_owned()
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &[&[&str]]) -> Vec<Vec<String>> {
        let row = |row: &&[&str]| row.iter().map(|cell| (*cell).to_owned()).collect();
        text.iter().map(row).collect()
    }

    #[test]
    fn columns_are_aligned() {
        let table = rows(&[
            &["NAME", "SIZE", "X"],
            &["a", "1000 B", ""],
            &["longer", "1 B", "x"],
        ]);
        assert_eq!(
            align(&table, &[1]),
            ["NAME      SIZE  X", "a       1000 B", "longer     1 B  x"]
        );
        assert!(align(&[], &[]).is_empty());
    }

    #[test]
    fn cells_are_as_wide_as_they_are_displayed() {
        let table = rows(&[&["\u{1b}[31mred\u{1b}[0m", "1"], &["\u{6f22}\u{5b57}", "2"]]);
        assert_eq!(
            align(&table, &[]),
            ["\u{1b}[31mred\u{1b}[0m   1", "\u{6f22}\u{5b57}  2"]
        );
    }
}
