//! Draws the training and the calibration.

use anyhow::{Result, anyhow, bail};
use plotters::coord::{Shift, types::RangedCoordf64};
use plotters::data::float::FloatPrettyPrinter;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use crate::model::{Bin, Epoch, Run};

/// In pixels.
const SIZE: (u32, u32) = (1080, 400);
/// A PNG has more pixels than an SVG, so that its letters are sharp.
const PNG_SCALE: u32 = 2;
/// Blue and vermilion of Okabe and Ito's palette, which colour-blind readers can distinguish.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];
const GREY: RGBColor = RGBColor(110, 110, 110);
/// The largest number of points in a line.
const MAX_POINTS: usize = 200;
/// Up to this number of epochs, each has a dot. Without a dot, a single epoch would be invisible.
const MAX_DOTS: usize = 20;
/// Lengths in a dashed line.
const DASH: u32 = 6;
const GAP: u32 = 4;
/// The length of a line in the legend.
const LEGEND_LINE: u32 = 30;
/// The radius of a bin that holds all rows.
const MAX_RADIUS: f64 = 12.;

/// The values that a panel shows of an epoch, on the training rows and on the test rows.
type EpochValues = fn(&Epoch) -> [f64; 2];

/// The file of a picture. It is opened before the training, so that a wrong name is an error at once.
pub struct Picture {
    file: File,
    is_svg: bool,
}

impl Picture {
    pub fn create(path: &Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        let is_svg = match extension.to_str() {
            Some("svg") => true,
            Some("png") => false,
            _ => bail!("expected a name that ends in .svg or .png"),
        };
        // An existing picture stays until the new one is ready.
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file, is_svg })
    }

    /// Draws a run with smoothing and one without.
    pub fn draw(mut self, runs: [&Run; 2]) -> Result<()> {
        // An included font makes the picture the same on every machine.
        register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
            .map_err(|_| anyhow!("the font cannot be read"))?;
        let mut bytes = Vec::new();
        if self.is_svg {
            let mut text = String::new();
            draw(SVGBackend::with_string(&mut text, SIZE), 1, runs)?;
            bytes = text.into_bytes();
        } else {
            let (width, height) = (PNG_SCALE * SIZE.0, PNG_SCALE * SIZE.1);
            let mut pixels = vec![0; 3 * (width * height) as usize];
            draw(BitMapBackend::with_buffer(&mut pixels, (width, height)), PNG_SCALE, runs)?;
            let mut encoder = png::Encoder::new(&mut bytes, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.write_header()?.write_image_data(&pixels)?;
        }
        self.file.set_len(0)?;
        Ok(self.file.write_all(&bytes)?)
    }
}

fn draw<DB: DrawingBackend>(backend: DB, scale: u32, runs: [&Run; 2]) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let root = backend.into_drawing_area();
    // A white background keeps the picture readable on a dark page.
    root.fill(&WHITE)?;
    let (top, bottom) = root.split_vertically(36 * scale);
    draw_legend(&top, scale)?;
    let panels = bottom.split_evenly((1, 3));

    let (losses, accuracies): (EpochValues, EpochValues) =
        (|epoch| [epoch.loss, epoch.test_loss], |epoch| [epoch.accuracy, epoch.test_accuracy]);
    let all = |values| runs.iter().flat_map(|run| &run.trace).flat_map(values);
    let loss_range = 0. ..1.05 * all(losses).fold(1e-9, f64::max);
    let accuracy_range = (all(accuracies).fold(1., f64::min) - 0.05).max(0.)..1.;
    let epochs = runs[0].trace.len();
    for (panel, title, unit, range, values) in [
        (&panels[0], "Loss", "loss against its own targets (nats)", loss_range, losses),
        (&panels[1], "Accuracy", "accuracy (share of the rows)", accuracy_range, accuracies),
    ] {
        let texts = [title, "epoch", unit];
        let mut chart = axes(panel, scale, texts, 1. ..epochs.max(2) as f64, range, epochs)?;
        for (run, colour) in runs.into_iter().zip(COLOURS) {
            let line = colour.stroke_width(2 * scale);
            let shown = run.trace.iter().enumerate().step_by(epochs.div_ceil(MAX_POINTS));
            let points = |i: usize| shown.clone().map(move |(x, y)| (1. + x as f64, values(y)[i]));
            if epochs <= MAX_DOTS {
                let dot = |style| move |point| Circle::new(point, 3 * scale, style);
                chart.draw_series(points(0).map(dot(line.filled())))?;
                chart.draw_series(points(1).map(dot(line)))?;
            }
            chart.draw_series(LineSeries::new(points(0), line))?;
            chart.draw_series(DashedLineSeries::new(points(1), DASH * scale, GAP * scale, line))?;
        }
    }
    draw_calibration(&panels[2], scale, runs)?;
    root.present()?;
    Ok(())
}

/// Draws the legend above the panels, where it covers no data.
fn draw_legend<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, scale: u32) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let text = font(16, scale).pos(Pos::new(HPos::Left, VPos::Center));
    let (mut x, y) = (60 * scale as i32, 20 * scale as i32);
    for (name, colour, dash) in [
        ("smoothed", COLOURS[0], LEGEND_LINE),
        ("not smoothed", COLOURS[1], LEGEND_LINE),
        ("training rows, during the epoch", GREY, LEGEND_LINE),
        ("test rows, after it", GREY, DASH),
    ] {
        let line = [(x, y), (x + (LEGEND_LINE * scale) as i32, y)];
        let style = colour.stroke_width(2 * scale);
        area.draw(&DashedPathElement::new(line, dash * scale, GAP * scale, style))?;
        x += ((LEGEND_LINE + 8) * scale) as i32;
        area.draw(&Text::new(name, (x, y), text.clone()))?;
        x += (area.estimate_text_size(name, &text)?.0 + 40 * scale) as i32;
    }
    Ok(())
}

/// Draws the accuracy of each bin against its confidence. On the dotted line, the two are equal.
fn draw_calibration<DB: DrawingBackend>(
    area: &DrawingArea<DB, Shift>,
    scale: u32,
    runs: [&Run; 2],
) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let texts = [
        "Calibration (dot area: rows)",
        "confidence (mean top probability)",
        "accuracy (share of test rows)",
    ];
    let mut chart = axes(area, scale, texts, 0. ..1., 0. ..1., usize::MAX)?;
    let ideal = [(0., 0.), (1., 1.)];
    let ideal = DashedLineSeries::new(ideal, 2 * scale, GAP * scale, GREY.stroke_width(scale));
    chart.draw_series(ideal)?;
    for (run, colour) in runs.into_iter().zip(COLOURS) {
        let bins = || run.bins.iter().filter(|bin| bin.rows > 0.);
        let rows: f64 = bins().map(|bin| bin.rows).sum();
        let point = |bin: &Bin| (bin.confidence / bin.rows, bin.correct / bin.rows);
        let dot = |bin: &Bin| {
            let radius = (MAX_RADIUS * (bin.rows / rows).sqrt()).max(2.) * f64::from(scale);
            Circle::new(point(bin), radius.round() as u32, colour.mix(0.7).filled())
        };
        chart.draw_series(LineSeries::new(bins().map(point), colour.stroke_width(scale)))?;
        chart.draw_series(bins().map(dot))?;
    }
    Ok(())
}

fn font(size: u32, scale: u32) -> TextStyle<'static> {
    ("sans-serif", size * scale).into()
}

/// A panel with a title and axes. `title`, `x` and `y` are texts.
fn axes<'a, DB: DrawingBackend>(
    panel: &DrawingArea<DB, Shift>,
    scale: u32,
    [title, x, y]: [&str; 3],
    x_range: Range<f64>,
    y_range: Range<f64>,
    epochs: usize,
) -> Result<ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>>
where
    DB::ErrorType: 'static,
{
    let mut chart = ChartBuilder::on(panel)
        .margin(8 * scale)
        .margin_right(16 * scale)
        .caption(title, font(18, scale))
        .x_label_area_size(44 * scale)
        .y_label_area_size(58 * scale)
        .build_cartesian_2d(x_range, y_range)?;
    let number = FloatPrettyPrinter { allow_scientific: false, min_decimal: 0, max_decimal: 3 };
    let format = |value: &f64| number.print(*value);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .set_all_tick_mark_size(5 * scale)
        // At most one label for each epoch.
        .x_labels(epochs.clamp(2, 6))
        .y_labels(6)
        .x_label_formatter(&format)
        .y_label_formatter(&format)
        .label_style(font(15, scale))
        .axis_desc_style(font(16, scale))
        .x_desc(x)
        .y_desc(y)
        .draw()?;
    Ok(chart)
}
