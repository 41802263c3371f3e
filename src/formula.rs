//! The one formula, in the terms that every backend gets.
//!
//! Smoothing, class weights and z-loss are cases of it. With the logits x of a row, its label y or its probabilities p, and
//! the params of each class ([`ClassParams`]), the weighted targets r and the loss are
//!
//! ```text
//! r_k  = on_value_k if k = y, else off_value_k      class targets
//! r_k  = prob_scale_k·p_k + off_value_k             probabilities
//! S    = Σ_k r_k                                    target_sum
//! lse  = log Σ_k exp(x_k)
//! loss = Σ_k r_k·(lse − x_k) + z·lse²
//! ∂loss/∂x_k = softmax(x)_k·(S + 2·z·lse) − r_k
//! ```
//!
//! The logits x are those given, or their [`LogitMap`]. With [`unmasked_epsilon`](LossParams::unmasked_epsilon) e, and n classes
//! in the row whose logit is not −∞, these classes get e·weight_k/n more in r_k. The loss is multiplied by the row's weight. The
//! loss and the gradient of an ignored row are 0. Forward and backward are written once, for all options. In terms of the
//! [`SoftmaxState`] of a row,
//!
//! ```text
//! lse  = max + log sum_exp
//! loss = target_sum·log sum_exp − target_dot + z·lse²
//! ```

use crate::error::{Error, Result};
use candle_core::{DType, Device, Layout, Tensor};

/// The params of one class. `T` is a number, or a collection with one for each class.
///
/// A tensor (CLASS_FIELDS, K) of them has a row for each field, in the order of the fields.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClassParams<T> {
    /// The factor of a probability p_k.
    pub prob_scale: T,
    /// r_k of a class that is not the label.
    pub off_value: T,
    /// r_k of the label, which is prob_scale + off_value. `over_others` computes it without the rounding of that sum.
    pub on_value: T,
    /// The class weight, for the divisor of a mean.
    pub weight: T,
}

pub(crate) const CLASS_FIELDS: usize = 4;

impl<T> ClassParams<T> {
    pub fn from_fields([prob_scale, off_value, on_value, weight]: [T; CLASS_FIELDS]) -> Self {
        Self { prob_scale, off_value, on_value, weight }
    }

    pub fn into_fields(self) -> [T; CLASS_FIELDS] {
        [self.prob_scale, self.off_value, self.on_value, self.weight]
    }

    pub fn map<U>(self, f: impl FnMut(T) -> U) -> ClassParams<U> {
        ClassParams::from_fields(self.into_fields().map(f))
    }
}

/// The params of all classes.
#[derive(Clone, Debug)]
pub(crate) enum ClassTable {
    /// The same for every class.
    Uniform(ClassParams<f64>),
    /// A tensor ([`CLASS_FIELDS`], K) on the logits' device, in the dtype of the arithmetic.
    PerClass(Tensor),
}

/// One loss to compute, validated.
#[derive(Clone, Debug)]
pub(crate) struct LossParams {
    pub class_dim: usize,
    /// K, the number of all classes. The logits may hold only a range of them.
    pub num_classes: usize,
    /// The first class of the logits, and of probabilities.
    pub first_class: usize,
    pub class_table: ClassTable,
    /// Whether the weighted target of the label is below that of other classes of the same weight.
    pub label_is_below: bool,
    /// What is spread over the classes of a row whose logit is not −∞, if it is not 0.
    pub unmasked_epsilon: f64,
    pub ignore_index: Option<i64>,
    /// A weight for each row, of dtype U8 or a floating-point dtype, detached, in the shape of the rows.
    pub row_weights: Option<Tensor>,
    pub logit_map: Option<LogitMap<f64>>,
    pub z_loss: f64,
    /// The divisor of the sum of the rows' losses. `None` means that they are not summed.
    pub divisor: Option<Divisor>,
    /// Whether the loss and the gradient are 0 if the divisor is, because no row has a weight.
    pub zero_if_no_weight: bool,
    /// Whether backward will need the rows' [`SavedState`].
    pub saves_state: bool,
    pub wants_metrics: bool,
}

/// What the logits of every formula are: cap·tanh(scale·x/cap), or scale·x without a cap. −∞ stays −∞.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LogitMap<T> {
    pub scale: T,
    pub cap: Option<T>,
}

/// The divisor of the sum of the rows' losses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Divisor<I = ()> {
    Number(f64),
    /// The sum of the labels' class weights over the rows that count. Only the kernels know it. `I` says where they have
    /// written it.
    WeightSum(I),
}

/// Online-softmax state of one row over a range of classes. `T` is a number, or a collection with one for each row.
///
/// The states of two ranges of a row merge. A tensor (STATE_FIELDS, N) of them has a row for each field, in the order of
/// the fields.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoftmaxState<T> {
    /// The largest logit x. Over no classes it is −inf, or on a GPU the lowest finite number.
    pub max: T,
    /// Σ exp(x − max).
    pub sum_exp: T,
    /// S = Σ r.
    pub target_sum: T,
    /// Σ r·(x − max). A common offset of the logits cancels in x − max, so it costs no digits. If all r are positive,
    /// all terms have the same sign, so the sum does not cancel.
    pub target_dot: T,
}

pub(crate) const STATE_FIELDS: usize = 4;

impl<T> SoftmaxState<T> {
    pub fn from_fields([max, sum_exp, target_sum, target_dot]: [T; STATE_FIELDS]) -> Self {
        Self { max, sum_exp, target_sum, target_dot }
    }

    pub fn into_fields(self) -> [T; STATE_FIELDS] {
        [self.max, self.sum_exp, self.target_sum, self.target_dot]
    }
}

/// What some options need of a row over a range of the classes, beside its [`SoftmaxState`]. A tensor of states has these fields
/// too, after those of the softmax state, if [`needs_extras`](LossParams::needs_extras).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExtraState<T> {
    /// The number of classes whose logit is not −∞.
    pub num_unmasked: T,
    /// The sum of their class weights times [`unmasked_scale`](LossParams::unmasked_scale).
    pub unmasked_sum: T,
    /// Σ weight·scale·(x − max) over them.
    pub unmasked_dot: T,
    /// Σ exp(x − max)·(x − max), without logits of +∞. It is NaN only if a logit is.
    pub exp_dot: T,
    /// The label's logit, or −∞ if the label is not in the range.
    pub label_logit: T,
    /// The first class whose logit is the largest.
    pub prediction: T,
}

pub(crate) const EXTRA_FIELDS: usize = 6;

impl<T> ExtraState<T> {
    pub fn from_fields(fields: [T; EXTRA_FIELDS]) -> Self {
        let [num_unmasked, unmasked_sum, unmasked_dot, exp_dot, label_logit, prediction] = fields;
        Self { num_unmasked, unmasked_sum, unmasked_dot, exp_dot, label_logit, prediction }
    }

    pub fn into_fields(self) -> [T; EXTRA_FIELDS] {
        let Self { num_unmasked, unmasked_sum, unmasked_dot, exp_dot, label_logit, prediction } =
            self;
        [num_unmasked, unmasked_sum, unmasked_dot, exp_dot, label_logit, prediction]
    }
}

/// The fields of a row's [`SoftmaxState`] over all classes that backward reads. A tensor (fields, N) stores them for all rows. If
/// [`unmasked_epsilon`](LossParams::unmasked_epsilon) e is not 0, there is a fourth field, the share e/(n·s) with s =
/// [`unmasked_scale`](LossParams::unmasked_scale). A class whose logit is not −∞ gets this share times s times its class weight
/// more in r.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedState<T> {
    pub max: T,
    pub sum_exp: T,
    pub target_sum: T,
}

impl LossParams {
    /// Whether an option needs the [`ExtraState`] of the rows.
    pub fn needs_extras(&self) -> bool {
        self.unmasked_epsilon != 0. || self.wants_metrics
    }

    /// The factor of the class weights in [`ExtraState`]: a power of two near 1/K, so that their sums with logits that are masked
    /// with the dtype's minimum do not overflow.
    pub fn unmasked_scale(&self) -> f64 {
        1. / self.num_classes.next_power_of_two() as f64
    }

    /// The number of fields of a row's state in memory.
    pub fn num_state_fields(&self) -> usize {
        num_state_fields(self.needs_extras())
    }

    /// The number of fields that are saved of a row.
    pub fn num_saved_fields(&self) -> usize {
        if self.unmasked_epsilon == 0. { 3 } else { 4 }
    }
}

/// The number of fields of a row's state in memory, with or without [`ExtraState`].
pub(crate) fn num_state_fields(needs_extras: bool) -> usize {
    if needs_extras { STATE_FIELDS + EXTRA_FIELDS } else { STATE_FIELDS }
}

/// What a backend's forward returns, in storages of type `S`.
pub(crate) struct ForwardOut<S> {
    /// The losses of the rows, or their reduction. On a GPU other numbers may follow in the same storage.
    pub loss: S,
    /// What backward will need, if it was asked for.
    pub saved: Option<SavedIn<S>>,
    /// The metrics of the rows, if they were asked for.
    pub metrics: Option<RowMetrics<S>>,
}

/// The metrics of all rows. The storages begin with their first row.
pub(crate) struct RowMetrics<S> {
    /// ([`METRIC_FIELDS`], N) in the dtype of the arithmetic: nll, correct, confidence, entropy, lse and counted of
    /// [`Metrics`](crate::Metrics).
    pub values: S,
    /// (N), u32.
    pub predictions: S,
}

pub(crate) const METRIC_FIELDS: usize = 6;

/// Where a forward has saved what backward needs.
pub(crate) struct SavedIn<S> {
    /// The storage, or `None` for that of the loss.
    pub storage: Option<S>,
    /// Where the [`SavedState`]s are in the storage, ([`num_saved_fields`](LossParams::num_saved_fields), N).
    pub layout: Layout,
    /// What the sum of the losses was divided by: a number, or the index of an element of the storage.
    pub divisor: Option<Divisor<usize>>,
}

impl<S> ForwardOut<S> {
    pub fn map<U>(self, f: impl Fn(S) -> U) -> ForwardOut<U> {
        ForwardOut {
            saved: self.saved.map(|saved| saved.map(&f)),
            metrics: self.metrics.map(|metrics| RowMetrics {
                values: f(metrics.values),
                predictions: f(metrics.predictions),
            }),
            loss: f(self.loss),
        }
    }
}

impl<S> SavedIn<S> {
    pub fn map<U>(self, f: impl FnOnce(S) -> U) -> SavedIn<U> {
        let Self { storage, layout, divisor } = self;
        SavedIn { storage: storage.map(f), layout, divisor }
    }
}

/// Whether logits may have the dtype.
pub(crate) fn is_logits_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
}

/// The dtype of the arithmetic and of the result.
pub(crate) fn result_dtype(logits: DType) -> DType {
    match logits {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The smallest and the largest positive normal number of a dtype of the arithmetic.
pub(crate) fn normal_range(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => (f64::MIN_POSITIVE, f64::MAX),
        _ => (f32::MIN_POSITIVE.into(), f32::MAX.into()),
    }
}

/// Whether tensors of numbers other than logits may have the floating-point dtype.
pub(crate) fn is_float_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F8E4M3 | DType::BF16 | DType::F16 | DType::F32 | DType::F64)
}

/// Checks that the device can compute with the dtype.
pub(crate) fn check_device_dtype(what: &'static str, dtype: DType, device: &Device) -> Result<()> {
    match (device, dtype) {
        (Device::Metal(_), DType::F64) => Err(Error::MetalF64 { what }),
        _ => Ok(()),
    }
}

/// Checks that targets of the dtype are class indices or probabilities.
pub(crate) fn check_target_dtype(dtype: DType) -> Result<()> {
    match dtype {
        DType::U8 | DType::U32 | DType::I16 | DType::I32 | DType::I64 => Ok(()),
        dtype if is_float_dtype(dtype) => Ok(()),
        dtype => Err(Error::TargetsDType {
            dtype,
            expected: "an integer dtype (class indices) or F8E4M3, F16, BF16, F32 or F64 (probabilities)",
        }),
    }
}
