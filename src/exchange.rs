//! What the processes of a split vocabulary exchange: the states of the rows, or the numbers that must agree.

use crate::autograd::{label_values, state_dtype};
use crate::error::{Error, Result};
use crate::layout::{check_memory, check_size};
use candle_core::{DType, Device, Tensor};

/// The classes that this process holds of a vocabulary that is split over several processes. They are the classes from
/// `first_class` on, of `num_classes` in all. How many they are follows from the logits, or from the rows of the weight.
///
/// The shards of all processes follow each other without gaps, in the order in which `gather` stacks, and cover all classes. Their
/// lengths may differ, and may be 0. [`check_shards`] checks this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// The first class of this process.
    pub first_class: usize,
    /// The number of classes of all processes.
    pub num_classes: usize,
}

impl Shard {
    /// Checks that the classes of this process are among all classes.
    pub(crate) fn check(self, num_classes_here: usize) -> Result<Self> {
        let Self { first_class, num_classes } = self;
        match first_class.checked_add(num_classes_here) {
            Some(end) if end <= num_classes && num_classes > 0 => Ok(self),
            _ => Err(Error::Shard { first_class, num_classes_here, num_classes }),
        }
    }
}

/// A tensor of each process that all processes get.
pub(crate) struct Exchange<'a> {
    shape: Vec<usize>,
    dtype: DType,
    device: &'a Device,
}

impl<'a> Exchange<'a> {
    /// The exchange of tensors of this shape, in the dtype of the states of these logits.
    pub fn new(shape: &[usize], logits_dtype: DType, device: &'a Device) -> Self {
        Self { shape: shape.to_vec(), dtype: state_dtype(logits_dtype, device), device }
    }

    /// Exchanges the tensor of this process for those of all, (processes, ..), contiguous from the start of the storage on. If this
    /// process has an error instead, it sends NaN, so that the other processes do not wait for it, and returns the error.
    pub fn run<T>(
        &self,
        local: Result<(T, Tensor)>,
        gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<(T, Tensor)> {
        match local {
            Ok((local, sent)) => Ok((local, self.checked(gather(&sent)?)?)),
            Err(error) => {
                // The caller needs the first error, not another of the exchange.
                let _ = self.nan().map(|nan| gather(&nan));
                Err(error)
            }
        }
    }

    /// Zeros in place of the tensor of this process.
    pub fn zeros(&self) -> Result<Tensor> {
        Ok(Tensor::zeros(self.shape.as_slice(), self.dtype, self.device)?)
    }

    /// NaN in place of the tensor of this process.
    fn nan(&self) -> Result<Tensor> {
        check_size(EXCHANGED, &self.shape)?;
        check_memory(EXCHANGED, &self.shape, self.shape.iter().product())?;
        let ones = Tensor::ones(self.shape.as_slice(), self.dtype, self.device)?;
        Ok((ones * f64::NAN)?)
    }

    /// The tensors of all processes, if they are what the exchange must give.
    fn checked(&self, gathered: Tensor) -> Result<Tensor> {
        let is_stack = match gathered.dims() {
            [processes, stacked @ ..] => *processes > 0 && *stacked == self.shape,
            [] => false,
        };
        let (device, expected_device) = (gathered.device().location(), self.device.location());
        if !is_stack || device != expected_device || gathered.dtype() != self.dtype {
            return Err(Error::Gathered {
                dtype: gathered.dtype(),
                shape: gathered.dims().to_vec(),
                device,
                expected_dtype: self.dtype,
                expected_device,
                stacked: self.shape.clone(),
            });
        }
        if gathered.is_contiguous() && gathered.layout().start_offset() == 0 {
            return Ok(gathered);
        }
        check_size(EXCHANGED, gathered.dims())?;
        check_memory(EXCHANGED, gathered.dims(), gathered.elem_count())?;
        Ok(gathered.force_contiguous()?)
    }
}

const EXCHANGED: &str = "what processes exchange";

/// Checks that the processes of a split vocabulary agree, which [`forward_shard`](crate::LabelSmoothingLoss::forward_shard) cannot
/// see. Every process calls it with its own arguments. If they disagree, all get the same error.
///
/// `targets` are class indices of any shape and integer dtype, the same on all processes. `num_classes_here` is the number of classes
/// of this process. `gather` is that of [`forward_shard`](crate::LabelSmoothingLoss::forward_shard). It is called once, with 20
/// numbers whatever the targets, of dtype f64 on the CPU and f32 on a GPU. The function copies the targets to the host, and so waits
/// for a GPU. Call it for the first batch, or in a search for a mistake.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_label_smoothing::{Shard, check_shards};
///
/// // One process that has all classes.
/// let targets = Tensor::new(&[0u32, 4, 2], &Device::Cpu)?;
/// let shard = Shard { first_class: 0, num_classes: 5 };
/// let gather = |tensor: &Tensor| tensor.unsqueeze(0);
/// assert!(check_shards(&targets, shard, 5, gather).is_ok());
///
/// let error = check_shards(&targets, shard, 4, gather).unwrap_err();
/// assert_eq!(error.to_string(), "the end of the last shard is 4 on process 0, expected 5: num_classes");
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
///
/// # Errors
/// A process whose number of rows, `num_classes` or targets differ from those of process 0; shards that do not follow each other from
/// class 0 to `num_classes`; no classes at all. Process i is the i-th that `gather` stacks. Targets of a floating-point dtype are an
/// error on their own process, and [`Error::ShardFailed`] on the others. An error of `gather`, or a tensor from it whose shape is not
/// (processes, 20), is an error of its own process.
pub fn check_shards(
    targets: &Tensor,
    shard: Shard,
    num_classes_here: usize,
    gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let exchange = Exchange::new(&[FACTS * DIGITS], DType::F32, targets.device());
    let facts =
        Facts::new(targets, shard, num_classes_here).and_then(|facts| facts.encode(&exchange));
    let ((), gathered) = exchange.run(facts.map(|facts| ((), facts)), gather)?;
    let gathered = gathered.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let mut all = Vec::new();
    for (process, digits) in gathered.iter().enumerate() {
        all.push(Facts::decode(digits).ok_or(Error::ShardFailed { process })?);
    }
    check_facts(&all)
}

/// What must agree.
#[derive(Clone, Copy)]
struct Facts {
    num_rows: u64,
    num_classes: u64,
    first_class: u64,
    num_classes_here: u64,
    targets_hash: u64,
}

const FACTS: usize = 5;
/// A number has four digits of 16 bits, which every dtype of an exchange holds exactly.
const DIGITS: usize = 4;

impl Facts {
    fn new(targets: &Tensor, shard: Shard, num_classes_here: usize) -> Result<Self> {
        let labels = label_values(targets)?;
        // FNV-1a, https://datatracker.ietf.org/doc/draft-eastlake-fnv
        let bytes = labels.iter().flat_map(|label| label.to_le_bytes());
        let targets_hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Ok(Self {
            num_rows: labels.len() as u64,
            num_classes: shard.num_classes as u64,
            first_class: shard.first_class as u64,
            num_classes_here: num_classes_here as u64,
            targets_hash,
        })
    }

    fn encode(self, exchange: &Exchange) -> Result<Tensor> {
        let Self { num_rows, num_classes, first_class, num_classes_here, targets_hash } = self;
        let digits = [num_rows, num_classes, first_class, num_classes_here, targets_hash]
            .map(|fact| [0, 16, 32, 48].map(|shift| (fact >> shift & 0xffff) as f64));
        Ok(Tensor::new(digits.as_flattened(), &Device::Cpu)?
            .to_dtype(exchange.dtype)?
            .to_device(exchange.device)?)
    }

    /// `None` if the digits are NaN.
    fn decode(digits: &[f64]) -> Option<Self> {
        let mut facts = digits.chunks(DIGITS).map(|digits| {
            let number =
                |sum: u64, &digit: &f64| (!digit.is_nan()).then_some(sum << 16 | digit as u64);
            digits.iter().rev().try_fold(0, number)
        });
        let mut next = || facts.next().flatten();
        Some(Self {
            num_rows: next()?,
            num_classes: next()?,
            first_class: next()?,
            num_classes_here: next()?,
            targets_hash: next()?,
        })
    }
}

fn check_facts(all: &[Facts]) -> Result<()> {
    let Some(first) = all.first() else {
        return Ok(());
    };
    let check = |process, what, found: u64, expected: u64, reason| match found == expected {
        true => Ok(()),
        false => {
            let (found, expected) = (found as usize, expected as usize);
            Err(Error::ShardNumber { process, what, found, expected, reason })
        }
    };
    let mut end = 0;
    for (process, facts) in all.iter().enumerate() {
        let as_first = "that of process 0";
        check(process, "the number of rows", facts.num_rows, first.num_rows, as_first)?;
        check(process, "num_classes", facts.num_classes, first.num_classes, as_first)?;
        let follows = "the shards follow each other from class 0 on, in the order of the processes";
        check(process, "first_class", facts.first_class, end, follows)?;
        let first_class = facts.first_class as usize;
        let shard = Shard { first_class, num_classes: facts.num_classes as usize };
        shard.check(facts.num_classes_here as usize)?;
        end = facts.first_class + facts.num_classes_here;
        if facts.targets_hash != first.targets_hash {
            return Err(Error::ShardTargets { process });
        }
    }
    let last = all.len() - 1;
    check(last, "the end of the last shard", end, first.num_classes, "num_classes")
}
