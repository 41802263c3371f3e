//! Handwritten digits of 8 x 8 pixels, for training and held out.

#[path = "../calibration/table.rs"]
mod table;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

pub const NUM_CLASSES: usize = 10;

/// Images, (rows, 1, 8, 8), of values from 0 to 1, and labels, (rows).
pub struct Digits {
    pub images: Tensor,
    pub labels: Tensor,
}

impl Digits {
    /// The images and the labels of some rows.
    pub fn batch(&self, rows: &[u32]) -> Result<(Tensor, Tensor)> {
        let rows = Tensor::new(rows, &Device::Cpu)?;
        Ok((self.images.index_select(&rows, 0)?, self.labels.index_select(&rows, 0)?))
    }
}

/// Reads the digits. The first four fifths are for training, the last fifth is held out.
pub fn read_digits(path: &Path) -> Result<[Digits; 2]> {
    read(path).with_context(|| format!("cannot use {}", path.display()))
}

fn read(path: &Path) -> Result<[Digits; 2]> {
    let table = table::read_csv(path)?;
    let ((rows, pixels), classes) = (table.x.dims2()?, table.classes.len());
    ensure!(pixels == 64, "{pixels} numbers in a row, expected the 64 pixels of a digit");
    ensure!(classes == NUM_CLASSES, "{classes} classes, expected {NUM_CLASSES}");
    let values = table.x.flatten_all()?;
    let (min, max) = (values.min(0)?.to_scalar::<f64>()?, values.max(0)?.to_scalar::<f64>()?);
    ensure!(min >= 0. && max <= 16., "pixels from {min} to {max}, expected 0 to 16");
    let images = (table.x.to_dtype(DType::F32)? / 16.)?.reshape((rows, 1, 8, 8))?;
    let part = |start, len| -> Result<Digits> {
        Ok(Digits { images: images.narrow(0, start, len)?, labels: table.y.narrow(0, start, len)? })
    };
    let held_out = rows / 5;
    Ok([part(0, rows - held_out)?, part(rows - held_out, held_out)?])
}
