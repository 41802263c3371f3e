//! Where the rows come from: a generator, or a CSV file.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use csv::StringRecord;
use rand::seq::SliceRandom;
use rand_distr::{Distribution, StandardNormal};
use std::collections::HashMap;
use std::f64::consts::{FRAC_1_SQRT_2, TAU};
use std::path::Path;

use crate::{Use, rng};

/// Row 0 of the generated data; the other rows are generated around it.
const SAMPLE: [f64; 10] = [5.1, 3.5, 1.4, 0.9, 2.8, 4.2, 1.3, 3.1, 1.6, 0.2];
const ROWS: usize = 1000;
const CLASSES: [&str; 3] = ["A", "B", "C"];
/// One unit of the generated noise in the units of the rows, a few millimetres on a flower.
const UNIT: f64 = 0.3;
/// How far a group lies from the middle, and how far apart the classes lie as a whole, in units of
/// the noise. Groups are learned slowly and classes at once: their mixture sets the pace.
const GROUP_RADIUS: f64 = 3.1;
const CLASS_RADIUS: f64 = 1.1;

/// Rows of numbers, and for each an index into the classes.
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

/// Groups of rows with normal noise. Each group raises two of the columns, and only the two together
/// decide the class. The classes are moved apart a little besides. All of that is fixed, so that no
/// seed gets an easier task than another.
pub fn generate(seed: u64) -> Table {
    let columns = SAMPLE.len();
    let pairs = (0..columns).flat_map(|first| (0..first).map(move |second| (first, second)));
    let group = |(first, second)| {
        let class = (first + second) % CLASSES.len();
        let (sin, cos) = (TAU * class as f64 / CLASSES.len() as f64).sin_cos();
        let apart = CLASS_RADIUS / (columns as f64).sqrt();
        let alternate = |j| if j % 2 == 0 { sin } else { -sin };
        let mut centre: Vec<f64> = (0..columns).map(|j| apart * (cos + alternate(j))).collect();
        centre[first] += GROUP_RADIUS * FRAC_1_SQRT_2;
        centre[second] += GROUP_RADIUS * FRAC_1_SQRT_2;
        (centre, class as u32)
    };
    let groups: Vec<(Vec<f64>, u32)> = pairs.map(group).collect();
    // Row 0 is the centre of the first group.
    let (origin, class) = &groups[0];
    let (mut rows, mut labels) = (vec![SAMPLE.to_vec()], vec![*class]);
    let mut rng = rng(seed, Use::Rows);
    for (centre, class) in groups.iter().cycle().skip(1).take(ROWS - 1) {
        let value = |j: usize| {
            let noise: f64 = StandardNormal.sample(&mut rng);
            SAMPLE[j] + UNIT * (centre[j] - origin[j] + noise)
        };
        rows.push((0..columns).map(value).collect());
        labels.push(*class);
    }
    let classes = CLASSES.map(String::from).to_vec();
    Table { rows, labels, classes }
}

/// Reads numbers with a class label in the last column. A complaint names the line and the column.
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
        // The csv crate counts blank lines to the record that follows them.
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
    // A header has no number among its features; a line with some of both is a row with a mistake.
    let announced = announced_classes(&records);
    let header = announced.is_some() || !first.iter().take(features).any(is_number);
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
    // Whole numbers in the order of their values, 10 after 9; words in that of the alphabet.
    found.sort_by_cached_key(|word| (word.parse::<i64>().ok(), word.clone()));
    found.dedup();
    let (n, k) = (rows.len(), found.len());
    let label = at(last, width - 1);
    ensure!(n >= 5, "{label}: {n} rows up to here, expected at least 5");
    ensure!(k > 1, "{label}: one class up to here, expected at least two");
    ensure!(n >= 2 * k, "{label}: {k} labels in {n} rows, expected a class");
    // Announced classes appear in the rows by their number, others by their name.
    let written = match &announced {
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
    let classes = announced.unwrap_or(found);
    Ok(Table { rows, labels, classes })
}

fn is_number(field: &str) -> bool {
    field.parse::<f64>().is_ok()
}

/// The classes, if the first line is like that of the tables which scikit-learn carries: the number
/// of rows, the number of features and what the labels 0, 1, ... stand for.
fn announced_classes(records: &[StringRecord]) -> Option<Vec<String>> {
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

/// The rows to train on and those to test on: where they stand in the table, and as tensors, standardised,
/// with their labels.
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
        training_rows.shuffle(&mut rng(seed, Use::Split));
        let test_rows = training_rows.split_off(rows - rows / 5);
        // Features in different units would need weights of different sizes. What the test rows look
        // like is not known at this point, so the training rows alone set the scale.
        let scale = statistics(table, &training_rows);
        let training = tensors(table, &training_rows, &scale, device)?;
        let test = tensors(table, &test_rows, &scale, device)?;
        Ok(Self { training_rows, test_rows, training, test })
    }
}

/// Mean and standard deviation of each column over the given rows.
fn statistics(table: &Table, rows: &[usize]) -> Vec<(f64, f64)> {
    let column = |j: usize| {
        let values = || rows.iter().map(move |&row| table.rows[row][j]);
        let mean = values().sum::<f64>() / rows.len() as f64;
        let variance = values().map(|v| (v - mean).powi(2)).sum::<f64>() / rows.len() as f64;
        // A constant column is left at zero, whatever its mean lost to rounding.
        let is_constant = variance.sqrt() <= 1e-12 * mean.abs();
        (mean, if is_constant { 1. } else { variance.sqrt() })
    };
    (0..table.columns()).map(column).collect()
}

/// The given rows standardised (rows, columns), and their labels (rows).
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
