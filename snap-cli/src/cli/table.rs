//! Tables: columns side by side, as wide as they need be, whatever is painted in them.

use console::measure_text_width;

use super::output::{Colour, line, paint, piece};
use crate::error::Result;

/// How a list is printed; for the arguments of every verb that prints a table.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Style {
    /// Leave the line with the columns' names out
    #[arg(long)]
    pub(super) no_header: bool,
}

impl Style {
    /// Prints a table; the columns named in `right` are numbers.
    pub(super) fn print(
        self,
        header: &[&str],
        rows: Vec<Vec<String>>,
        right: &[usize],
    ) -> Result<()> {
        table(if self.no_header { &[] } else { header }, rows, right)
    }
}

/// Prints a table; the columns named in `right` are numbers. With no header there is no line for it.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>, right: &[usize]) -> Result<()> {
    let head = header.iter().map(|name| paint(Colour::Bold, name));
    let head: Option<Vec<String>> = (!header.is_empty()).then(|| head.collect());
    let rows = head.into_iter().chain(rows);
    let rows = rows.map(|row| row.iter().map(|cell| piece(cell)).collect());
    lay_out(&rows.collect::<Vec<_>>(), right)
        .iter()
        .try_for_each(|text| line(text))
}

fn lay_out(rows: &[Vec<String>], right: &[usize]) -> Vec<String> {
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
    fn columns_stand_below_one_another() {
        let table = rows(&[
            &["NAME", "SIZE", "X"],
            &["a", "1000 B", ""],
            &["longer", "1 B", "x"],
        ]);
        assert_eq!(
            lay_out(&table, &[1]),
            ["NAME      SIZE  X", "a       1000 B", "longer     1 B  x"]
        );
        assert!(lay_out(&[], &[]).is_empty());
    }

    #[test]
    fn colours_and_wide_letters_take_the_room_that_is_seen() {
        let table = rows(&[&["\u{1b}[31mred\u{1b}[0m", "1"], &["\u{6f22}\u{5b57}", "2"]]);
        assert_eq!(
            lay_out(&table, &[]),
            ["\u{1b}[31mred\u{1b}[0m   1", "\u{6f22}\u{5b57}  2"]
        );
    }
}
