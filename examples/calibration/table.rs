//! Reads rows of numbers with a class label in the last column from a CSV file.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use csv::StringRecord;
use std::collections::HashMap;
use std::path::Path;

/// Features `x`, (rows, columns), and labels `y`, (rows), which are indices into `classes`.
pub struct Table {
    pub x: Tensor,
    pub y: Tensor,
    pub classes: Vec<String>,
}

/// Reads rows of numbers with a class label in the last column. An error names the line and the column.
pub fn read_csv(path: &Path) -> Result<Table> {
    let bytes = std::fs::read(path)?;
    let valid = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
    let (line, last) = (valid.split('\n').count(), valid.rsplit('\n').next().unwrap_or_default());
    let column = last.split(',').count();
    ensure!(valid.len() == bytes.len(), "line {line}, column {column}: the text is not UTF-8");
    let text = valid.trim_start_matches('\u{feff}');
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

    let first = records.first().context("line 1, column 1: the file is empty")?;
    let features = first.len() - 1;
    ensure!(features > 0, "{}: expected numbers, a comma, a label", at(first, 0));
    // A header has no number among its features. A first line with numbers and words is an invalid row.
    let declared = declared_classes(&records);
    let header = declared.is_some() || !first.iter().take(features).any(is_number);
    let records = records.get(usize::from(header)..).unwrap_or_default();
    let [head, .., last] = records else { bail!("{}: expected more than one row", at(first, 0)) };
    let width = head.len();
    ensure!(width > 1, "{}: expected numbers, a comma, a label", at(head, 0));
    let (mut values, mut words) = (Vec::new(), Vec::new());
    for record in records {
        let len = record.len();
        ensure!(len == width, "{}: {len} columns, expected {width}", at(record, len.min(width)));
        for (column, field) in record.iter().enumerate() {
            let at = || at(record, column);
            ensure!(!field.is_empty(), "{}: the field is empty", at());
            if column + 1 == width {
                words.push(field);
            } else {
                let value = field.parse::<f64>().unwrap_or(f64::NAN);
                let is_finite = (value as f32).is_finite();
                ensure!(is_finite, "{}: {field:?} is not a finite number", at());
                values.push(value);
            }
        }
    }

    let mut found: Vec<String> = words.iter().map(|word| word.to_string()).collect();
    // Integers are sorted by value, so that 10 follows 9, and words alphabetically.
    found.sort_by_cached_key(|word| (word.parse::<i64>().ok(), word.clone()));
    found.dedup();
    let (n, k) = (records.len(), found.len());
    let end = at(last, width - 1);
    ensure!(n >= 5, "{end}: {n} rows up to here, expected at least 5");
    ensure!(k > 1, "{end}: one class up to here, expected at least two");
    ensure!(n >= 2 * k, "{end}: {k} labels in {n} rows: the last column is no class");
    // The rows contain the number of a class if the first line declares the names, and the name otherwise.
    let written = match &declared {
        Some(names) => (0..names.len()).map(|class| class.to_string()).collect(),
        None => found.clone(),
    };
    let index: HashMap<&str, u32> = written.iter().map(String::as_str).zip(0..).collect();
    let label = |(record, word): (&StringRecord, &&str)| {
        let class = index.get(word).copied();
        class.with_context(|| format!("{}: no class {word:?}", at(record, width - 1)))
    };
    let labels = records.iter().zip(&words).map(label).collect::<Result<Vec<u32>>>()?;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    words.iter().for_each(|word| *counts.entry(word).or_default() += 1);
    for (record, word) in records.iter().zip(&words) {
        let is_single = counts.get(word) == Some(&1);
        ensure!(!is_single, "{}: {word:?} is the label of one row only", at(record, width - 1));
    }
    let x = Tensor::from_vec(values, (n, width - 1), &Device::Cpu)?;
    let y = Tensor::from_vec(labels, n, &Device::Cpu)?;
    Ok(Table { x, y, classes: declared.unwrap_or(found) })
}

fn is_number(field: &str) -> bool {
    field.parse::<f64>().is_ok()
}

/// The names of the classes, if the first line has the format of scikit-learn's data sets: the number of rows, the number of
/// features and the names of the labels 0, 1, ...
fn declared_classes(records: &[StringRecord]) -> Option<Vec<String>> {
    let first: Vec<&str> = records.first()?.iter().collect();
    let [rows, features, names @ ..] = &first[..] else { return None };
    let fits = rows.parse() == Ok(records.len() - 1)
        && features.parse() == Ok(records.get(1)?.len() - 1)
        && names.len() >= 2
        && !names.iter().any(|name| is_number(name));
    fits.then(|| names.iter().map(|name| name.to_string()).collect())
}
