//! The rows: generated, or read from a CSV file.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use csv::StringRecord;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal};
use std::collections::HashMap;
use std::f64::consts::{FRAC_1_SQRT_2, TAU};
use std::path::Path;

use crate::{Stream, rng};

/// Row 0 of the generated data; the other rows are generated around it.
const SAMPLE: [f64; 10] = [5.1, 3.5, 1.4, 0.9, 2.8, 4.2, 1.3, 3.1, 1.6, 0.2];
const ROWS: usize = 1000;
const CLASSES: [&str; 3] = ["A", "B", "C"];
/// The standard deviation of the noise in the generated columns.
const NOISE_DEVIATION: f64 = 0.3;
/// The distance of a group from the middle, in standard deviations of the noise. The network learns the groups slowly.
const GROUP_RADIUS: f64 = 3.1;
/// The distance of a whole class from the middle, in the same unit. The network learns it within few steps.
const CLASS_RADIUS: f64 = 1.1;

/// Rows of numbers with their labels, which are indices into `classes`.
pub struct Table {
    pub rows: Vec<Vec<f64>>,
    pub labels: Vec<u32>,
    pub classes: Vec<String>,
}

impl Table {
    pub fn columns(&self) -> usize {
        self.rows[0].len()
    }
}

/// Generates groups of rows with normal noise. In each group, two of the columns have higher values, and the pair of columns
/// decides the class. In addition, the classes are shifted apart. The seed changes only the noise, so that no seed gives an
/// easier task than another.
pub fn generate(seed: u64) -> Table {
    let columns = SAMPLE.len();
    let pairs = (0..columns).flat_map(|first| (0..first).map(move |second| (first, second)));
    let group = |(first, second)| {
        let class = (first + second) % CLASSES.len();
        let (sin, cos) = (TAU * class as f64 / CLASSES.len() as f64).sin_cos();
        let shift = CLASS_RADIUS / (columns as f64).sqrt();
        let alternate = |j| if j % 2 == 0 { sin } else { -sin };
        let mut centre: Vec<f64> = (0..columns).map(|j| shift * (cos + alternate(j))).collect();
        centre[first] += GROUP_RADIUS * FRAC_1_SQRT_2;
        centre[second] += GROUP_RADIUS * FRAC_1_SQRT_2;
        (centre, class as u32)
    };
    let groups: Vec<(Vec<f64>, u32)> = pairs.map(group).collect();
    // Row 0 is the centre of the first group.
    let (origin, class) = &groups[0];
    let (mut rows, mut labels) = (vec![SAMPLE.to_vec()], vec![*class]);
    let mut rng = rng(seed, Stream::Rows);
    for (centre, class) in groups.iter().cycle().skip(1).take(ROWS - 1) {
        let value = |j: usize| {
            let noise: f64 = StandardNormal.sample(&mut rng);
            SAMPLE[j] + NOISE_DEVIATION * (centre[j] - origin[j] + noise)
        };
        rows.push((0..columns).map(value).collect());
        labels.push(*class);
    }
    let classes = CLASSES.map(String::from).to_vec();
    Table { rows, labels, classes }
}

/// Reads rows of numbers with a class label in the last column. An error names the line and the column.
pub fn read_csv(path: &Path) -> Result<Table> {
    let bytes = std::fs::read(path)?;
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text.trim_start_matches('\u{feff}'),
        Err(error) => {
            let valid = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
            let line = valid.split('\n').next_back().unwrap_or_default();
            let (line, column) = (valid.split('\n').count(), line.split(',').count());
            bail!("line {line}, column {column}: the text is not UTF-8");
        }
    };
    let mut reader = csv::ReaderBuilder::new();
    reader.has_headers(false).flexible(true).trim(csv::Trim::All);
    let records = reader.from_reader(text.as_bytes()).into_records();
    let records: Vec<StringRecord> = records.collect::<Result<_, _>>()?;
    let at = |record: &StringRecord, column: usize| {
        // In the csv crate, the position of a record includes the blank lines before it.
        let start = record.position().map_or(0, |start| start.byte() as usize);
        let (before, rest) = text.split_at_checked(start).unwrap_or((text, ""));
        let blank = rest.chars().take_while(|c| "\r\n".contains(*c));
        let line = 1 + before.chars().chain(blank).filter(|&c| c == '\n').count();
        format!("line {line}, column {}", column + 1)
    };

    let first = records.first();
    let first = first.context("line 1, column 1: the file is empty")?;
    let features = first.len() - 1;
    ensure!(features > 0, "{}: expected numbers, a comma, a label", at(first, 0));
    // A header has no number among its features. A first line with numbers and words is an invalid row.
    let declared = declared_classes(&records);
    let header = declared.is_some() || !first.iter().take(features).any(is_number);
    let records = &records[header as usize..];
    let [head, .., last] = records else { bail!("{}: expected more than one row", at(first, 0)) };
    let width = head.len();
    let (mut rows, mut words) = (Vec::new(), Vec::new());
    for record in records {
        let mut row = Vec::new();
        let len = record.len();
        let end = len.min(width);
        ensure!(len == width, "{}: {len} columns, expected {width}", at(record, end));
        for (column, field) in record.iter().enumerate() {
            let at = || at(record, column);
            ensure!(!field.is_empty(), "{}: the field is empty", at());
            if column + 1 == width {
                words.push(field);
                continue;
            }
            let value = field.parse::<f64>().unwrap_or(f64::NAN);
            let fits = (value as f32).is_finite();
            ensure!(fits, "{}: {field:?} is not a finite number", at());
            row.push(value);
        }
        rows.push(row);
    }

    let mut found: Vec<String> = words.iter().map(|word| word.to_string()).collect();
    // Integers are sorted by value, so that 10 follows 9, and words alphabetically.
    found.sort_by_cached_key(|word| (word.parse::<i64>().ok(), word.clone()));
    found.dedup();
    let (n, k) = (rows.len(), found.len());
    let label = at(last, width - 1);
    ensure!(n >= 5, "{label}: {n} rows up to here, expected at least 5");
    ensure!(k > 1, "{label}: one class up to here, expected at least two");
    ensure!(n >= 2 * k, "{label}: {k} labels in {n} rows, expected a class");
    // The rows contain the number of a class if the first line declares the names, and the name otherwise.
    let written = match &declared {
        Some(names) => (0..names.len()).map(|class| class.to_string()).collect(),
        None => found.clone(),
    };
    let index: HashMap<&str, u32> = written.iter().map(String::as_str).zip(0..).collect();
    let mut labels = Vec::new();
    for (record, word) in records.iter().zip(&words) {
        let class = index.get(word).copied();
        let class = class.with_context(|| format!("{}: no class {word:?}", at(record, width - 1)));
        labels.push(class?);
    }
    let classes = declared.unwrap_or(found);
    Ok(Table { rows, labels, classes })
}

fn is_number(field: &str) -> bool {
    field.parse::<f64>().is_ok()
}

/// The names of the classes, if the first line has the format of scikit-learn's data sets: the number of rows, the number of
/// features and the names of the labels 0, 1, ...
fn declared_classes(records: &[StringRecord]) -> Option<Vec<String>> {
    let first: Vec<&str> = records.first()?.iter().collect();
    let [rows, features, names @ ..] = &first[..] else {
        return None;
    };
    let fits = rows.parse() == Ok(records.len() - 1)
        && features.parse() == Ok(records.get(1)?.len() - 1)
        && names.len() >= 2
        && !names.iter().any(|name| is_number(name));
    fits.then(|| names.iter().map(|name| name.to_string()).collect())
}

/// The training rows and the test rows: their indices in the table, and tensors of their standardized features and labels.
pub struct Split {
    pub training_rows: Vec<usize>,
    pub test_rows: Vec<usize>,
    pub training: (Tensor, Tensor),
    pub test: (Tensor, Tensor),
}

impl Split {
    pub fn new(table: &Table, seed: u64, device: &Device) -> Result<Self> {
        let rows = table.rows.len();
        let mut training_rows: Vec<usize> = (0..rows).collect();
        training_rows.shuffle(&mut rng(seed, Stream::Split));
        let test_rows = training_rows.split_off(rows - rows / 5);
        // Standardized features need weights of similar sizes. The test rows must not influence the training, so the
        // statistics are those of the training rows.
        let scale = statistics(table, &training_rows);
        let training = tensors(table, &training_rows, &scale, device)?;
        let test = tensors(table, &test_rows, &scale, device)?;
        Ok(Self { training_rows, test_rows, training, test })
    }
}

/// The mean and the standard deviation of each column over the given rows.
fn statistics(table: &Table, rows: &[usize]) -> Vec<(f64, f64)> {
    let column = |j: usize| {
        let values = || rows.iter().map(move |&row| table.rows[row][j]);
        let mean = values().sum::<f64>() / rows.len() as f64;
        let variance = values().map(|v| (v - mean).powi(2)).sum::<f64>() / rows.len() as f64;
        // A constant column becomes zero: dividing by its deviation would amplify the rounding error of the mean.
        let is_constant = variance.sqrt() <= 1e-12 * mean.abs();
        (mean, if is_constant { 1. } else { variance.sqrt() })
    };
    (0..table.columns()).map(column).collect()
}

/// The standardized features of the given rows, (rows, columns), and their labels, (rows).
fn tensors(
    table: &Table,
    rows: &[usize],
    scale: &[(f64, f64)],
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let values = rows.iter().flat_map(|&row| table.rows[row].iter().zip(scale));
    let values = values.map(|(value, (mean, deviation))| ((value - mean) / deviation) as f32);
    let x = Tensor::from_iter(values, device)?.reshape((rows.len(), scale.len()))?;
    let y = Tensor::from_iter(rows.iter().map(|&row| table.labels[row]), device)?;
    Ok((x, y))
}
