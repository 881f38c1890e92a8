//! The results of transfers, and their table.

use std::fmt::Write as _;
use std::time::Duration;

/// The measurements of each program for each transfer, in the order in which they were first added.
#[derive(Debug, Default)]
pub(super) struct Table(Vec<Cell>);

#[derive(Debug)]
struct Cell {
    transfer: &'static str,
    program: &'static str,
    times: Vec<Duration>,
    bytes: Vec<u64>,
}

impl Cell {
    /// Returns the median of the times in seconds, and of the numbers of bytes.
    fn medians(&self) -> (f64, u64) {
        let time = median(&self.times).unwrap_or_default();
        (time.as_secs_f64(), median(&self.bytes).unwrap_or_default())
    }
}

fn median<T: Copy + Ord>(values: &[T]) -> Option<T> {
    let mut values = values.to_vec();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

impl Table {
    /// Adds a measurement.
    pub(super) fn add(
        &mut self,
        transfer: &'static str,
        program: &'static str,
        time: Duration,
        bytes: u64,
    ) {
        let is_same = |cell: &&mut Cell| cell.transfer == transfer && cell.program == program;
        match self.0.iter_mut().find(is_same) {
            Some(cell) => {
                cell.times.push(time);
                cell.bytes.push(bytes);
            }
            None => self.0.push(Cell {
                transfer,
                program,
                times: vec![time],
                bytes: vec![bytes],
            }),
        }
    }

    /// Returns the table in Markdown. The ratios are those of the first program of each transfer to the others.
    pub(super) fn markdown(&self) -> String {
        let mut text = String::from(
            "| Transfer | Program | Time, s | Network, bytes | cowl's time / this | cowl's bytes / this |\n\
             |---|---|---|---|---|---|\n",
        );
        let mut transfers: Vec<&str> = Vec::new();
        for cell in &self.0 {
            if !transfers.contains(&cell.transfer) {
                transfers.push(cell.transfer);
            }
        }
        for transfer in transfers {
            let mut cells = self.0.iter().filter(|cell| cell.transfer == transfer);
            let Some(own) = cells.next() else { continue };
            let (own_time, own_bytes) = own.medians();
            text.push_str(&row(transfer, own, None));
            for cell in cells {
                text.push_str(&row("", cell, Some((own_time, own_bytes))));
            }
        }
        text
    }
}

#[expect(clippy::cast_precision_loss, reason = "ratios with two digits")]
fn row(transfer: &str, cell: &Cell, own: Option<(f64, u64)>) -> String {
    let (time, bytes) = cell.medians();
    let ratio = |own: f64, other: f64| match other > 0.0 {
        true => format!("{:.2}", own / other),
        false => "-".to_owned(),
    };
    let [times, sizes] = match own {
        None => [String::new(), String::new()],
        Some((own_time, own_bytes)) => {
            [ratio(own_time, time), ratio(own_bytes as f64, bytes as f64)]
        }
    };
    let mut text = String::new();
    let program = cell.program;
    if writeln!(
        text,
        "| {transfer} | {program} | {time:.2} | {} | {times} | {sizes} |",
        grouped(bytes)
    )
    .is_err()
    {
        text.push('?');
    }
    text
}

/// Formats a number with commas between groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_medians_and_ratios() {
        let mut table = Table::default();
        for seconds in [9, 2, 1] {
            table.add("first", "`cowl`", Duration::from_secs(seconds), 1_000_000);
        }
        table.add("first", "`peer`", Duration::from_secs(4), 500_000);
        table.add("second", "`cowl`", Duration::from_secs(1), 0);
        table.add("second", "`peer`", Duration::from_secs(1), 0);
        let text = table.markdown();
        let rows: Vec<_> = text.lines().skip(2).collect();
        assert_eq!(
            rows,
            [
                "| first | `cowl` | 2.00 | 1,000,000 |  |  |",
                "|  | `peer` | 4.00 | 500,000 | 0.50 | 2.00 |",
                "| second | `cowl` | 1.00 | 0 |  |  |",
                "|  | `peer` | 1.00 | 0 | 1.00 | - |",
            ]
        );
    }
}
