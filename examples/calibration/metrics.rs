//! Accuracy, confidence and calibration on the test rows.

use anyhow::Result;
use candle_label_smoothing::Metrics;

pub const METRICS: [&str; 3] = ["accuracy", "mean top probability", "expected calibration error"];
/// The number of calibration bins.
pub const BINS: usize = 10;

/// Sums over the test rows whose top probability lies in this bin.
#[derive(Clone, Copy, Default)]
pub struct Bin {
    pub rows: f64,
    pub confidence: f64,
    pub correct: f64,
}

impl Bin {
    fn add(&mut self, other: Bin) {
        self.rows += other.rows;
        self.confidence += other.confidence;
        self.correct += other.correct;
    }
}

/// The results of several trainings that differ in the seed.
#[derive(Default)]
pub struct Results {
    /// The METRICS of each training.
    pub metrics: [Vec<f64>; 3],
    /// The loss and the accuracy of each epoch, as sums over the trainings.
    pub trace: Vec<[f64; 2]>,
    /// The bins of all trainings together.
    pub bins: [Bin; BINS],
}

impl Results {
    /// Adds a training, from its metrics of the test rows and its trace.
    pub fn add(&mut self, rows: &Metrics, trace: &[[f64; 2]]) -> Result<()> {
        let (top, correct) = (rows.confidence.to_vec1::<f32>()?, rows.correct.to_vec1::<f32>()?);
        let mut bins = [Bin::default(); BINS];
        for (confidence, correct) in top.iter().copied().map(f64::from).zip(correct) {
            let i = ((confidence * BINS as f64) as usize).min(BINS - 1);
            bins[i].add(Bin { rows: 1., confidence, correct: correct.into() });
        }
        let mean = |value: fn(&Bin) -> f64| bins.iter().map(value).sum::<f64>() / top.len() as f64;
        let metrics = [
            mean(|bin| bin.correct),
            mean(|bin| bin.confidence),
            // The distance of confidence and accuracy in each bin, weighted by its rows.
            mean(|bin| (bin.confidence - bin.correct).abs()),
        ];
        self.metrics.iter_mut().zip(metrics).for_each(|(all, value)| all.push(value));
        self.bins.iter_mut().zip(bins).for_each(|(sum, bin)| sum.add(bin));
        self.trace.resize(trace.len(), [0.; 2]);
        for (sum, epoch) in self.trace.iter_mut().zip(trace) {
            *sum = [sum[0] + epoch[0], sum[1] + epoch[1]];
        }
        Ok(())
    }
}

pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The sample standard deviation of at least two values.
pub fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}
