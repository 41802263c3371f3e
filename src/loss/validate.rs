//! The checks of a call, and the parameters of the kernels that follow from the options.

use super::{CLASS_WEIGHTS, LabelSmoothingLoss, LogitsInfo, Reduction};
use crate::error::{Error, Result};
use crate::exchange::Shard;
use crate::formula::{
    ClassTable, Divisor, LogitMap, LossParams, check_device_dtype, check_target_dtype,
    is_float_dtype, is_logits_dtype, normal_range, result_dtype,
};
use crate::layout::{check_size, num_rows, row_shape};
use crate::smoothing;
use candle_core::{DType, Device, Tensor};
use std::sync::PoisonError;

impl LabelSmoothingLoss {
    /// The divisor of the sum of the losses; `None` if they are not summed.
    fn divisor(&self, num_rows: usize, targets: &Tensor) -> Option<Divisor> {
        let has_weighted_labels = targets.dtype().is_int()
            && (self.class_weights.is_some() || self.ignore_index.is_some());
        let is_weighted = has_weighted_labels || self.row_weights.is_some();
        match self.reduction {
            Reduction::None => None,
            Reduction::Sum => Some(Divisor::Number(1.)),
            Reduction::Mean | Reduction::MeanOrZero if is_weighted => Some(Divisor::WeightSum(())),
            Reduction::Mean | Reduction::MeanOrZero => Some(Divisor::Number(num_rows as f64)),
        }
    }

    /// Checks shapes, dtypes, devices and options. Returns the parameters, with the class table, and the detached targets.
    pub(crate) fn validate(
        &self,
        logits: &LogitsInfo,
        targets: &Tensor,
    ) -> Result<(LossParams, Tensor)> {
        let LogitsInfo { dims, dtype, device, is_tracked, shard } = *logits;
        let class_dim = self.class_dim(dims)?;
        let Shard { first_class, num_classes } = match shard {
            None if dims[class_dim] == 0 => return Err(Error::NoClasses { shape: dims.to_vec() }),
            None => Shard { first_class: 0, num_classes: dims[class_dim] },
            Some(shard) => shard.check(dims[class_dim])?,
        };
        if !is_logits_dtype(dtype) {
            return Err(Error::LogitsDType { dtype });
        }
        check_size("logits", dims)?;
        if let Some(weights) = &self.class_weights {
            smoothing::check_length(CLASS_WEIGHTS, weights, num_classes)?;
        }
        self.smoothing.check(num_classes)?;

        let (logits_device, targets_device) = (device.location(), targets.device().location());
        if logits_device != targets_device {
            return Err(Error::DeviceMismatch { logits: logits_device, targets: targets_device });
        }
        check_device_dtype("logits", dtype, device)?;
        check_device_dtype("targets", targets.dtype(), targets.device())?;
        self.check_target_shape(dims, targets, class_dim)?;
        check_target_dtype(targets.dtype())?;
        self.check_row_weights(dims, device, class_dim)?;

        let params = LossParams {
            class_dim,
            num_classes,
            first_class,
            class_table: self.class_table(num_classes, result_dtype(dtype), device)?,
            label_is_below: self.smoothing.label_is_below(num_classes),
            unmasked_epsilon: self.smoothing.unmasked_epsilon(),
            ignore_index: self.ignore_index,
            row_weights: self.row_weights.clone(),
            logit_map: self.logit_map(result_dtype(dtype)),
            z_loss: self.z_loss,
            divisor: self.divisor(num_rows(dims, class_dim), targets),
            zero_if_no_weight: self.reduction == Reduction::MeanOrZero,
            saves_state: is_tracked,
            wants_metrics: false,
        };
        Ok((params, targets.detach()))
    }

    /// Whether [`LossParams::needs_extras`], for a loss without metrics.
    pub(crate) fn needs_extras(&self) -> bool {
        self.smoothing.unmasked_epsilon() != 0.
    }

    pub(crate) fn reduction(&self) -> Reduction {
        self.reduction
    }

    pub(crate) fn class_dim(&self, logits: &[usize]) -> Result<usize> {
        let Some(last) = logits.len().checked_sub(1) else {
            return Err(Error::LogitsRank);
        };
        match self.class_dim {
            Some(class_dim) if class_dim > last => {
                Err(Error::ClassDim { class_dim, shape: logits.to_vec() })
            }
            class_dim => Ok(class_dim.unwrap_or(last)),
        }
    }

    fn check_target_shape(
        &self,
        logits: &[usize],
        targets: &Tensor,
        class_dim: usize,
    ) -> Result<()> {
        let dtype = targets.dtype();
        if dtype.is_float() {
            if targets.dims() != logits {
                return Err(Error::ProbabilityTargetsShape {
                    dtype,
                    targets: targets.dims().to_vec(),
                    logits: logits.to_vec(),
                });
            }
            // The shape is checked first: its error tells class indices in a float dtype from probabilities.
            if let Some(ignore_index) = self.ignore_index {
                return Err(Error::IgnoreIndexWithProbabilities { ignore_index, dtype });
            }
        } else {
            let expected = row_shape(logits, class_dim);
            if targets.dims() != expected {
                return Err(Error::ClassTargetsShape {
                    dtype,
                    targets: targets.dims().to_vec(),
                    expected,
                    logits: logits.to_vec(),
                    class_dim,
                });
            }
        }
        Ok(())
    }

    fn check_row_weights(
        &self,
        logits: &[usize],
        logits_device: &Device,
        class_dim: usize,
    ) -> Result<()> {
        let Some(weights) = &self.row_weights else {
            return Ok(());
        };
        let dtype = weights.dtype();
        if dtype != DType::U8 && !is_float_dtype(dtype) {
            return Err(Error::RowWeightsDType { dtype });
        }
        let (logits_device, device) = (logits_device.location(), weights.device().location());
        if device != logits_device {
            return Err(Error::RowWeightsDevice { logits: logits_device, weights: device });
        }
        check_device_dtype("row weights", weights.dtype(), weights.device())?;
        let expected = row_shape(logits, class_dim);
        if weights.dims() != expected {
            let (weights, logits) = (weights.dims().to_vec(), logits.to_vec());
            return Err(Error::RowWeightsShape { weights, expected, logits, class_dim });
        }
        Ok(())
    }

    /// The scale and the softcap, for arithmetic in `dtype`; `None` if neither is set.
    fn logit_map(&self, dtype: DType) -> Option<LogitMap<f64>> {
        let (least, most) = normal_range(dtype);
        let is_set = self.logit_scale != 1. || self.softcap.is_some();
        is_set.then(|| LogitMap {
            scale: self.logit_scale.clamp(least, most),
            cap: self.softcap.map(|cap| cap.clamp(least, most)),
        })
    }

    /// The class params, for arithmetic in `dtype`. Class weights and priors are uploaded to a device once, which waits for the
    /// device.
    fn class_table(&self, num_classes: usize, dtype: DType, device: &Device) -> Result<ClassTable> {
        let mut tables = self.class_tables.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tables
            .iter()
            .find(|table| table.dtype() == dtype && table.device().same_device(device));
        if let Some(table) = known {
            return Ok(ClassTable::PerClass(table.clone()));
        }
        let weights = self.class_weights.as_deref();
        let class_table = self.smoothing.class_table(weights, num_classes, dtype, device)?;
        if let ClassTable::PerClass(table) = &class_table {
            // The copy is queued on this thread's stream. Other threads may have other streams, which do not wait for it.
            device.synchronize()?;
            tables.push(table.clone());
        }
        Ok(class_table)
    }
}
