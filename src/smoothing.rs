//! The conventions of label smoothing, as params of the classes.

use crate::autograd;
use crate::error::{Error, Result, TargetsOf};
use crate::formula::{
    CLASS_FIELDS, ClassParams, ClassTable, LossParams, check_device_dtype, check_target_dtype,
    is_float_dtype, normal_range,
};
use crate::layout::{check_memory, check_size};
use candle_core::{D, DType, Device, Tensor};
use std::sync::Arc;

/// A convention of label smoothing and its ε: how the smoothed targets q follow from the given targets p.
///
/// p is the one-hot vector of a class label, or a row of probabilities. Libraries call several formulas label smoothing,
/// so this type has no default and no conversion from a number. The constructor's name says which formula it is.
/// [The guide](crate::guide::epsilon) lists the conventions of other libraries, and says how to choose ε.
///
/// ```
/// use candle_label_smoothing::{Smoothing, smooth_targets};
/// use candle_core::{Device, Tensor};
///
/// let labels = Tensor::new(&[1u32], &Device::Cpu)?;
/// let soft = smooth_targets(&labels, 3, &Smoothing::over_others(0.1)?)?;
/// assert_eq!(soft.to_vec2::<f32>()?, [[0.05, 0.9, 0.05]]);
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Smoothing {
    epsilon: f64,
    spread: Spread,
}

/// The classes that ε goes to.
#[derive(Clone, Debug)]
enum Spread {
    All,
    Others,
    Prior(Arc<[f64]>),
    Unmasked,
}

impl Smoothing {
    /// No smoothing, q = p: plain cross-entropy.
    pub fn none() -> Self {
        Self { epsilon: 0., spread: Spread::All }
    }

    /// Spreads ε evenly over all K classes, the label included: q = (1−ε)·p + ε/K.
    ///
    /// This is the formula of [Szegedy et al. 2016](https://arxiv.org/abs/1512.00567), of the `label_smoothing` argument
    /// of PyTorch's `CrossEntropyLoss`, of Keras and of optax. With three classes and ε = 0.1 the label 1 becomes
    /// [0.0333, 0.9333, 0.0333].
    ///
    /// # Errors
    /// ε must lie in 0 to 1, ends included.
    pub fn over_all(epsilon: f64) -> Result<Self> {
        Self::new(epsilon, Spread::All)
    }

    /// Spreads ε evenly over the K−1 classes other than the label: q = (1−ε)·p + ε·(1−p)/(K−1).
    ///
    /// This is the formula of tensor2tensor and newer fairseq. With three classes and ε = 0.1 the label 1 becomes
    /// [0.05, 0.9, 0.05]. It equals `over_all(ε·K/(K−1))` if that is at most 1, for labels and for probabilities.
    ///
    /// # Errors
    /// ε must lie in 0 to 1, ends included. With one class (K = 1), using the smoothing is an error.
    pub fn over_others(epsilon: f64) -> Result<Self> {
        Self::new(epsilon, Spread::Others)
    }

    /// Spreads ε over the classes in proportion to `prior`: q = (1−ε)·p + ε·prior.
    ///
    /// A prior is for example the relative frequency of each class, or the unigram distribution of a vocabulary, as in
    /// [Pereyra et al. 2017](https://arxiv.org/abs/1701.06548). Its shape is (K), its dtype F8E4M3, F16, BF16, F32 or
    /// F64, its device any. It is a constant, and this function copies it to the host.
    ///
    /// # Errors
    /// ε must lie in 0 to 1, ends included. The prior must have one dimension and finite values >= 0 whose sum is 1 within
    /// 0.001; it is then normalised. Sizes beyond the memory and errors of the prior's device are errors too. Its
    /// length is checked against K when the smoothing is used.
    pub fn toward(epsilon: f64, prior: &Tensor) -> Result<Self> {
        let mut prior = read_class_vector("prior probabilities", prior)?;
        let sum = prior.iter().fold(0., |sum, p| sum + p);
        if (sum - 1.).abs() > 1e-3 {
            return Err(Error::PriorSum { sum });
        }
        prior.iter_mut().for_each(|p| *p /= sum);
        Self::new(epsilon, Spread::Prior(prior.into()))
    }

    /// Spreads ε evenly over the classes of a row whose logit is not −∞: q_k = (1−ε)·p_k + ε/n for these n classes, and (1−ε)·p_k
    /// for the others.
    ///
    /// It is for logits in which −∞ marks classes that are not allowed, such as actions that are not possible or a constrained
    /// vocabulary. There the loss with [`over_all`](Self::over_all) is infinite, because it gives each masked class a share. A
    /// class is masked if its logit is −∞ before a scale and a softcap. A masked label has an infinite loss, unless ε is 1
    /// or its class weight is 0. A row whose logits are all −∞ is NaN. Without a masked class this is
    /// [`over_all`](Self::over_all). [The guide](crate::guide::masks) has an example.
    ///
    /// # Errors
    /// ε must lie in 0 to 1, ends included. [`smooth_targets`] returns an error, since it does not know the logits.
    pub fn over_unmasked(epsilon: f64) -> Result<Self> {
        Self::new(epsilon, Spread::Unmasked)
    }

    fn new(epsilon: f64, spread: Spread) -> Result<Self> {
        // The range does not contain NaN.
        if !(0. ..=1.).contains(&epsilon) {
            return Err(Error::Epsilon { epsilon });
        }
        Ok(Self { epsilon, spread })
    }

    /// Checks that the smoothing is possible with `num_classes` classes.
    pub(crate) fn check(&self, num_classes: usize) -> Result<()> {
        match &self.spread {
            Spread::Others if num_classes == 1 => Err(Error::OneClass),
            Spread::Prior(prior) => check_length("prior probabilities", prior, num_classes),
            Spread::All | Spread::Others | Spread::Unmasked => Ok(()),
        }
    }

    /// What is spread over the classes whose logit is not −∞. The class params do not contain it.
    pub(crate) fn unmasked_epsilon(&self) -> f64 {
        match self.spread {
            Spread::Unmasked => self.epsilon,
            _ => 0.,
        }
    }

    /// The class params of all classes, for arithmetic in `dtype` on `device`.
    pub(crate) fn class_table(
        &self,
        weights: Option<&[f64]>,
        num_classes: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<ClassTable> {
        if weights.is_none() && !matches!(self.spread, Spread::Prior(_)) {
            return Ok(ClassTable::Uniform(self.class_params(num_classes, 0, 1.)));
        }
        let (least, most) = normal_range(dtype);
        let (least, most) = (least * WEIGHT_HEADROOM, most / WEIGHT_HEADROOM);
        let is_possible = |weight: f64| weight == 0. || (least..=most).contains(&weight);
        let mut class_weights = weights.into_iter().flatten().enumerate();
        if let Some((class, &value)) = class_weights.find(|(_, weight)| !is_possible(**weight)) {
            return Err(Error::WeightRange { class, value, least, most });
        }
        let weight = |class| weights.map_or(1., |w: &[f64]| w.get(class).copied().unwrap_or(0.));
        let fields: Vec<f64> = (0..num_classes)
            .flat_map(|class| self.class_params(num_classes, class, weight(class)).into_fields())
            .collect();
        // Metal has no f64, so the device comes last.
        let table = Tensor::from_vec(fields, (num_classes, CLASS_FIELDS), &Device::Cpu)?
            .t()?
            .contiguous()?
            .to_dtype(dtype)?
            .to_device(device)?;
        Ok(ClassTable::PerClass(table))
    }

    /// Whether the label's weighted target is below that of other classes of the same weight, as for `over_others` with a large
    /// ε.
    pub(crate) fn label_is_below(&self, num_classes: usize) -> bool {
        self.class_params(num_classes, 0, 1.).prob_scale < 0.
    }

    /// The params of a class with class weight `weight`. The conventions differ only here.
    fn class_params(&self, num_classes: usize, class: usize, weight: f64) -> ClassParams<f64> {
        let (epsilon, classes) = (self.epsilon, num_classes as f64);
        let (prob_scale, off_value, on_value) = match &self.spread {
            Spread::All => (1. - epsilon, epsilon / classes, None),
            // These are 1−e and e/K of over_all with e = ε·K/(K−1), without the rounding of e. The label's value is
            // given directly, so that it is exactly 0 for ε = 1.
            Spread::Others => {
                let off_value = epsilon / (classes - 1.);
                (1. - epsilon - off_value, off_value, Some(1. - epsilon))
            }
            Spread::Prior(prior) => {
                let prior = prior.get(class).copied().unwrap_or(0.);
                (1. - epsilon, epsilon * prior, None)
            }
            Spread::Unmasked => (1. - epsilon, 0., None),
        };
        ClassParams {
            prob_scale: weight * prob_scale,
            off_value: weight * off_value,
            on_value: weight * on_value.unwrap_or(prob_scale + off_value),
            weight,
        }
    }
}

/// The factor between class weights and the limits of the dtype's normal numbers. A sum of this many weights, by which a mean
/// divides, does not overflow. This fraction of a weight stays normal.
const WEIGHT_HEADROOM: f64 = (1u64 << 24) as f64;

/// Copies class weights or a prior to the host and checks each value.
pub(crate) fn read_class_vector(what: &'static str, tensor: &Tensor) -> Result<Vec<f64>> {
    let dtype = tensor.dtype();
    if tensor.rank() != 1 || !is_float_dtype(dtype) {
        return Err(Error::VectorType { what, dtype, shape: tensor.dims().to_vec() });
    }
    let len = tensor.elem_count();
    if len == 0 {
        // candle's conversion of an empty view reads beyond its storage.
        return Ok(Vec::new());
    }
    autograd::check_storage(tensor)?;
    check_memory(what, tensor.dims(), len)?;
    let mut host = tensor.to_device(&Device::Cpu)?;
    if dtype == DType::F8E4M3 {
        // candle 0.11.1's conversion from f8 to f64 overflows the stack.
        host = host.to_dtype(DType::F32)?;
    }
    let values = host.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    match values.iter().position(|v| !(v.is_finite() && *v >= 0.)) {
        Some(class) => Err(Error::VectorValue { what, class, value: values[class] }),
        None => Ok(values),
    }
}

/// Checks that class weights or a prior have a value for each class.
pub(crate) fn check_length(what: &'static str, values: &[f64], num_classes: usize) -> Result<()> {
    if values.len() != num_classes {
        return Err(Error::VectorLength { what, len: values.len(), num_classes });
    }
    Ok(())
}

/// The smoothed targets of `labels`, as a tensor: to inspect, to mix, or for another loss.
///
/// `labels` of an integer dtype are class indices of any shape (..). The result has shape (.., K) with K = `num_classes`.
/// `labels` of a floating-point dtype are probabilities of shape (.., K), as mixup makes them, and keep their shape. K class
/// indices in a float dtype would be taken for one such row. The result is f32, on the labels' device, and a constant: no
/// gradient flows back to the labels. The formulas stand at [`Smoothing`].
///
/// [`LabelSmoothingLoss`](crate::LabelSmoothingLoss) does not need this function. It smooths labels as it reads them.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_label_smoothing::{Smoothing, smooth_targets};
///
/// let labels = Tensor::new(&[2u32, 0], &Device::Cpu)?;
/// let soft = smooth_targets(&labels, 4, &Smoothing::over_all(0.2)?)?;
/// assert_eq!(
///     soft.to_vec2::<f32>()?,
///     [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]
/// );
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
///
/// # Errors
/// A label outside 0 to K−1 (on a GPU its distribution is NaN instead), probabilities whose last
/// dimension is not K, an unsupported dtype, f64 on Metal, K = 0, K = 1
/// with [`Smoothing::over_others`], [`Smoothing::over_unmasked`], a prior of another length than K, and sizes beyond the memory.
pub fn smooth_targets(
    labels: &Tensor,
    num_classes: usize,
    smoothing: &Smoothing,
) -> Result<Tensor> {
    if num_classes == 0 {
        return Err(Error::NoClasses { shape: [labels.dims(), &[0]].concat() });
    }
    smoothing.check(num_classes)?;
    if matches!(smoothing.spread, Spread::Unmasked) {
        return Err(Error::SmoothTargetsUnmasked);
    }
    check_device_dtype("labels", labels.dtype(), labels.device())?;
    check_target_dtype(labels.dtype())?;
    if labels.dtype().is_float() && labels.dim(D::Minus1).ok() != Some(num_classes) {
        return Err(Error::ProbabilityLabelsShape {
            dtype: labels.dtype(),
            shape: labels.dims().to_vec(),
            num_classes,
        });
    }
    let mut shape = labels.dims().to_vec();
    shape.truncate(labels.rank() - usize::from(labels.dtype().is_float()));
    let class_dim = shape.len();
    shape.push(num_classes);
    check_size("smoothed targets", &shape)?;
    let params = LossParams {
        class_dim,
        num_classes,
        first_class: 0,
        class_table: smoothing.class_table(None, num_classes, DType::F32, labels.device())?,
        label_is_below: smoothing.label_is_below(num_classes),
        unmasked_epsilon: 0.,
        ignore_index: None,
        row_weights: None,
        logit_map: None,
        z_loss: 0.,
        divisor: None,
        zero_if_no_weight: false,
        saves_state: false,
        wants_metrics: false,
    };
    autograd::smooth_targets(&params, labels, shape)
        .map_err(|error| error.in_function(TargetsOf::SmoothTargets))
}
