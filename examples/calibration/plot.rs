//! Draws the training and the calibration.

use anyhow::{Context, Result, anyhow, bail};
use plotters::coord::types::RangedCoordf64;
use plotters::data::float::FloatPrettyPrinter;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use crate::metrics::{Bin, Results};

/// The size in pixels. An SVG is shown at half this size, in which the letters of a PNG would not be sharp.
const SIZE: (u32, u32) = (2160, 800);
/// Blue and vermilion of Okabe and Ito's palette, which colour-blind readers can distinguish.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];
const GREY: RGBColor = RGBColor(110, 110, 110);
/// The largest number of points in a line.
const MAX_POINTS: usize = 200;
/// Up to this number of epochs, each has a dot. Without a dot, a single epoch would be invisible.
const MAX_DOTS: usize = 20;
/// The radius of a bin that holds all rows.
const MAX_RADIUS: f64 = 24.;

/// The file of a picture. It is opened before the training, so that a wrong name is an error at once.
pub struct Picture<'a> {
    path: &'a Path,
    file: File,
    is_svg: bool,
}

impl<'a> Picture<'a> {
    pub fn create(path: &'a Path) -> Result<Self> {
        Self::open(path).with_context(|| format!("cannot draw {}", path.display()))
    }

    fn open(path: &'a Path) -> Result<Self> {
        let extension = path.extension().unwrap_or_default().to_ascii_lowercase();
        let is_svg = match extension.to_str() {
            Some("svg") => true,
            Some("png") => false,
            _ => bail!("expected a name that ends in .svg or .png"),
        };
        // An existing picture stays until the new one is ready.
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        Ok(Self { path, file, is_svg })
    }

    /// Draws the results with smoothing and without.
    pub fn draw(self, results: &[Results; 2]) -> Result<()> {
        let path = self.path;
        self.write(results).with_context(|| format!("cannot draw {}", path.display()))
    }

    fn write(mut self, results: &[Results; 2]) -> Result<()> {
        // An included font makes the picture the same on every machine.
        register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
            .map_err(|_| anyhow!("the font cannot be read"))?;
        let (width, height) = SIZE;
        let mut bytes = Vec::new();
        if self.is_svg {
            let mut text = String::new();
            draw(SVGBackend::with_string(&mut text, SIZE), results)?;
            let size = |scale| format!("width=\"{}\" height=\"{}\"", width / scale, height / scale);
            bytes = text.replacen(&size(1), &size(2), 1).into_bytes();
        } else {
            let mut pixels = vec![0; 3 * (width * height) as usize];
            draw(BitMapBackend::with_buffer(&mut pixels, SIZE), results)?;
            let mut encoder = png::Encoder::new(&mut bytes, width, height);
            encoder.set_color(png::ColorType::Rgb);
            encoder.write_header()?.write_image_data(&pixels)?;
        }
        self.file.set_len(0)?;
        Ok(self.file.write_all(&bytes)?)
    }
}

fn draw<DB>(backend: DB, results: &[Results; 2]) -> Result<()>
where
    DB: DrawingBackend<ErrorType: 'static>,
{
    let root = backend.into_drawing_area();
    // A white background keeps the picture readable on a dark page.
    root.fill(&WHITE)?;
    // The legend is above the panels, where it covers no data.
    let (legend, bottom) = root.split_vertically(72);
    let font = TextStyle::from(("sans-serif", 32)).pos(Pos::new(HPos::Left, VPos::Center));
    for (name, colour, x) in [("smoothed", COLOURS[0], 120), ("not smoothed", COLOURS[1], 440)] {
        let line = [(x, 40), (x + 60, 40)];
        legend.draw(&PathElement::new(line, colour.stroke_width(4)))?;
        legend.draw(&Text::new(name, (x + 76, 40), font.clone()))?;
    }
    let panels = bottom.split_evenly((1, 3));
    let [loss, accuracy, calibration] = &panels[..] else { bail!("no place for the panels") };

    // The mean loss and accuracy of each epoch over the trainings.
    let traces = results.each_ref().map(|results| {
        let count = results.metrics[0].len() as f64;
        results.trace.iter().map(|epoch| epoch.map(|sum| sum / count)).collect::<Vec<_>>()
    });
    let num_epochs = traces[0].len();
    let values = |i: usize| traces.iter().flatten().map(move |epoch| epoch[i]);
    let loss_range = 0. ..1.05 * values(0).fold(1e-9, f64::max);
    let accuracy_range = (values(1).fold(1., f64::min) - 0.05).max(0.)..1.;
    for (i, panel, texts, range) in [
        (0, loss, ["Loss", "epoch", "loss against its own targets (nats)"], loss_range),
        (
            1,
            accuracy,
            ["Accuracy", "epoch", "accuracy (mean of the epoch's batches)"],
            accuracy_range,
        ),
    ] {
        let mut chart = axes(panel, texts, 1. ..num_epochs.max(2) as f64, range, num_epochs)?;
        for (trace, colour) in traces.iter().zip(COLOURS) {
            let points = trace.iter().enumerate().step_by(num_epochs.div_ceil(MAX_POINTS));
            let points = points.map(|(epoch, values)| (1. + epoch as f64, values[i]));
            if num_epochs <= MAX_DOTS {
                let dot = |point| Circle::new(point, 6, colour.filled());
                chart.draw_series(points.clone().map(dot))?;
            }
            chart.draw_series(LineSeries::new(points, colour.stroke_width(4)))?;
        }
    }

    // The accuracy of each bin against its confidence. On the dotted line, the two are equal.
    let texts = [
        "Calibration (larger dot: more rows)",
        "confidence (mean top probability)",
        "accuracy (share of test rows)",
    ];
    let mut chart = axes(calibration, texts, 0. ..1., 0. ..1., usize::MAX)?;
    let equal = [(0., 0.), (1., 1.)];
    chart.draw_series(DashedLineSeries::new(equal, 4, 8, GREY.stroke_width(2)))?;
    for (results, colour) in results.iter().zip(COLOURS) {
        let bins = || results.bins.iter().filter(|bin| bin.rows > 0.);
        let num_rows: f64 = bins().map(|bin| bin.rows).sum();
        let point = |bin: &Bin| (bin.confidence / bin.rows, bin.correct / bin.rows);
        let dot = |bin: &Bin| {
            let radius = (MAX_RADIUS * (bin.rows / num_rows).sqrt()).max(4.);
            Circle::new(point(bin), radius.round() as u32, colour.mix(0.7).filled())
        };
        chart.draw_series(LineSeries::new(bins().map(point), colour.stroke_width(2)))?;
        chart.draw_series(bins().map(dot))?;
    }
    root.present()?;
    Ok(())
}

/// A panel with a title and axes. `title`, `x` and `y` are texts.
fn axes<'a, DB: DrawingBackend<ErrorType: 'static>>(
    panel: &DrawingArea<DB, plotters::coord::Shift>,
    [title, x, y]: [&str; 3],
    x_range: Range<f64>,
    y_range: Range<f64>,
    num_epochs: usize,
) -> Result<ChartContext<'a, DB, Cartesian2d<RangedCoordf64, RangedCoordf64>>> {
    let mut chart = ChartBuilder::on(panel)
        .margin(16)
        .margin_right(32)
        .caption(title, ("sans-serif", 36))
        .x_label_area_size(88)
        .y_label_area_size(116)
        .build_cartesian_2d(x_range, y_range)?;
    let number = FloatPrettyPrinter { allow_scientific: false, min_decimal: 0, max_decimal: 3 };
    let format = |value: &f64| number.print(*value);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .axis_style(BLACK.stroke_width(2))
        .set_all_tick_mark_size(10)
        // At most one label for each epoch.
        .x_labels(num_epochs.clamp(2, 6))
        .y_labels(6)
        .x_label_formatter(&format)
        .y_label_formatter(&format)
        .label_style(("sans-serif", 30))
        .axis_desc_style(("sans-serif", 32))
        .x_desc(x)
        .y_desc(y)
        .draw()?;
    Ok(chart)
}
