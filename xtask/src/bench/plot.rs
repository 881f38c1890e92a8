//! Draws a comparison as a bar chart. The kernel's overlayfs is 1; bars to the left are faster, bars to the right
//! slower, on a logarithmic scale.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::outcome::{Line, Outcome};
use super::rows::Group;
use crate::run::{Failure, Result};

const COLORS: [RGBColor; 9] = [
    RGBColor(0x99, 0x99, 0x99),
    RGBColor(0x44, 0x77, 0xaa),
    RGBColor(0xcc, 0x66, 0x77),
    RGBColor(0x22, 0x88, 0x33),
    RGBColor(0x66, 0xcc, 0x99),
    RGBColor(0xcc, 0xbb, 0x44),
    RGBColor(0xaa, 0x33, 0x77),
    RGBColor(0xee, 0x88, 0x66),
    RGBColor(0x33, 0x33, 0x33),
];
const WIDTH: u32 = 900;
/// Height of a bar.
const BAR: u32 = 9;
/// Space between two rows.
const GAP: u32 = 12;
/// Range of the axis. Ratios outside it are drawn to the edge, with their value.
const RANGE: [f64; 2] = [0.05, 20.0];

/// Draws the rows of a group.
pub(super) fn draw(outcome: &Outcome, group: Group, title: &str, file: &Path) -> Result<()> {
    let lines: Vec<_> = outcome.lines.iter().filter(|l| l.group == group).collect();
    let names: Vec<&str> = outcome.compared().collect();
    let picture = draw_lines(&lines, &names, title)
        .map_err(|error| Failure(format!("cannot draw {title}: {error}")))?;
    std::fs::write(file, picture)?;
    Ok(())
}

type Drawn<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn draw_lines(lines: &[&Line], names: &[&str], title: &str) -> Drawn<String> {
    let bars = u32::try_from(names.len())?;
    let row = bars * BAR + GAP;
    let height = 110 + row * u32::try_from(lines.len().max(1))?;
    let mut picture = String::new();
    {
        let area = SVGBackend::with_string(&mut picture, (WIDTH, height)).into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(
            &format!(
                "{title}: kernel overlayfs = 1, bars to the left are faster, to the right slower"
            ),
            ("sans-serif", 15),
        )?;
        let (legend, area) = area.split_vertically(24);
        draw_legend(&legend, names)?;
        let rows = f64::from(row) * lines.len().max(1) as f64;
        let mut chart = ChartBuilder::on(&area)
            .margin_right(60)
            .x_label_area_size(30)
            .y_label_area_size(210)
            .build_cartesian_2d((RANGE[0]..RANGE[1]).log_scale(), 0.0..rows)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(TRANSPARENT)
            .x_labels(9)
            .x_label_formatter(&|ratio| format!("{ratio}"))
            .draw()?;
        chart.draw_series([PathElement::new(vec![(1.0, 0.0), (1.0, rows)], BLACK)])?;
        for (index, line) in lines.iter().enumerate() {
            // The y axis points up, and the first row is at the top.
            let top = rows - f64::from(row) * index as f64 - f64::from(GAP) / 2.0;
            let middle = top - f64::from(bars * BAR) / 2.0;
            // Leaves space for the value of a bar that extends to the edge.
            let (x, y) = chart.backend_coord(&(RANGE[0], middle));
            text(&area, (x - 36, y), &line.name, (13, HPos::Right))?;
            for (bar, name) in names.iter().enumerate() {
                let Some([median, ..]) = line.ratio(name) else {
                    continue;
                };
                let upper = top - f64::from(BAR) * bar as f64;
                let end = median.clamp(RANGE[0], RANGE[1]);
                let corners = [(1.0, upper), (end, upper - f64::from(BAR) + 1.0)];
                chart.draw_series([Rectangle::new(corners, color(bar).filled())])?;
                let middle = upper - f64::from(BAR) / 2.0;
                let side = match median < 1.0 {
                    true => HPos::Right,
                    false => HPos::Left,
                };
                let value = format!("{median:.2}");
                text(
                    &area,
                    chart.backend_coord(&(end, middle)),
                    &value,
                    (9, side),
                )?;
            }
        }
        area.present()?;
    }
    Ok(picture)
}

fn color(index: usize) -> RGBColor {
    COLORS.get(index % COLORS.len()).copied().unwrap_or(BLACK)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Draws text to the left or to the right of a point, which is given in coordinates of the whole picture.
fn text(area: &Area<'_>, point: (i32, i32), text: &str, (size, side): (i32, HPos)) -> Drawn<()> {
    let offset = match side {
        HPos::Right => -4,
        _ => 4,
    };
    let style = ("sans-serif", size)
        .into_text_style(area)
        .pos(Pos::new(side, VPos::Center));
    // `backend_coord` returns coordinates of the whole picture, while an area draws relative to its own origin.
    let (x, y) = area.get_base_pixel();
    let position = (point.0 - x + offset, point.1 - y);
    area.draw(&Text::new(text.to_owned(), position, style))?;
    Ok(())
}

fn draw_legend(area: &Area<'_>, names: &[&str]) -> Drawn<()> {
    let mut x = 20;
    for (index, name) in names.iter().enumerate() {
        area.draw(&Rectangle::new(
            [(x, 8), (x + 10, 18)],
            color(index).filled(),
        ))?;
        let style = ("sans-serif", 12)
            .into_text_style(area)
            .pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new((*name).to_owned(), (x + 15, 13), style))?;
        x += 40 + 7 * i32::try_from(name.len())?;
    }
    Ok(())
}
