//! The training and the calibration as a picture.

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

/// In pixels of an SVG; a PNG has twice as many for sharp letters.
const SIZE: (u32, u32) = (1080, 400);
const PNG_SCALE: u32 = 2;
/// Blue and vermilion of Okabe and Ito's palette, which colour-blind readers tell apart.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];
const GREY: RGBColor = RGBColor(110, 110, 110);
/// A line has no more points than a panel has room for.
const POINTS: usize = 200;
/// So few epochs are marked, and a single one is seen at all.
const MARKED: usize = 20;
/// Pixels of a dashed line, of a line in the legend, and the radius of a bin that has all rows.
const DASH: u32 = 6;
const GAP: u32 = 4;
const SAMPLE: u32 = 30;
const LARGEST_DOT: f64 = 12.;

/// What a panel shows of an epoch: on the training rows and on the test rows.
type Figures = fn(&Epoch) -> [f64; 2];

/// The file of a picture, opened before there is anything to draw, so that a wrong name is told at once.
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
        // What is there already stays until the new picture is ready.
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { file, is_svg })
    }

    /// Draws a training with smoothing and one without.
    pub fn draw(mut self, runs: [&Run; 2]) -> Result<()> {
        // A font of its own: the same picture on every machine.
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
    // A background of its own: it reads on a dark page too.
    root.fill(&WHITE)?;
    let (top, bottom) = root.split_vertically(36 * scale);
    draw_legend(&top, scale)?;
    let panels = bottom.split_evenly((1, 3));

    let (losses, accuracies): (Figures, Figures) =
        (|epoch| [epoch.loss, epoch.test_loss], |epoch| [epoch.accuracy, epoch.test_accuracy]);
    let all = |figures| runs.iter().flat_map(|run| &run.trace).flat_map(figures);
    let loss_range = 0. ..1.05 * all(losses).fold(1e-9, f64::max);
    let accuracy_range = (all(accuracies).fold(1., f64::min) - 0.05).max(0.)..1.;
    let epochs = runs[0].trace.len();
    for (panel, title, unit, range, figures) in [
        (&panels[0], "Loss", "loss against its own targets (nats)", loss_range, losses),
        (&panels[1], "Accuracy", "accuracy (share of the rows)", accuracy_range, accuracies),
    ] {
        let texts = [title, "epoch", unit];
        let mut chart = axes(panel, scale, texts, 1. ..epochs.max(2) as f64, range, epochs)?;
        for (run, colour) in runs.into_iter().zip(COLOURS) {
            let line = colour.stroke_width(2 * scale);
            let shown = run.trace.iter().enumerate().step_by(epochs.div_ceil(POINTS));
            let points = |i: usize| shown.clone().map(move |(x, y)| (1. + x as f64, figures(y)[i]));
            if epochs <= MARKED {
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

/// Above the panels, where it covers no data.
fn draw_legend<DB: DrawingBackend>(area: &DrawingArea<DB, Shift>, scale: u32) -> Result<()>
where
    DB::ErrorType: 'static,
{
    let text = font(16, scale).pos(Pos::new(HPos::Left, VPos::Center));
    let (mut x, y) = (60 * scale as i32, 20 * scale as i32);
    for (name, colour, dash) in [
        ("smoothed", COLOURS[0], SAMPLE),
        ("not smoothed", COLOURS[1], SAMPLE),
        ("training rows, during the epoch", GREY, SAMPLE),
        ("test rows, after it", GREY, DASH),
    ] {
        let line = [(x, y), (x + (SAMPLE * scale) as i32, y)];
        let style = colour.stroke_width(2 * scale);
        area.draw(&DashedPathElement::new(line, dash * scale, GAP * scale, style))?;
        x += ((SAMPLE + 8) * scale) as i32;
        area.draw(&Text::new(name, (x, y), text.clone()))?;
        x += (area.estimate_text_size(name, &text)?.0 + 40 * scale) as i32;
    }
    Ok(())
}

/// Confidence and accuracy of each bin; the dotted line is where the two agree.
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
        let point = |bin: &Bin| (bin.confidence / bin.rows, bin.right / bin.rows);
        let dot = |bin: &Bin| {
            let radius = (LARGEST_DOT * (bin.rows / rows).sqrt()).max(2.) * f64::from(scale);
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

/// A panel with its title and what its two axes are.
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
        // No more than one label an epoch.
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
