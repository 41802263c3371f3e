//! The parts of the compilation for a GPU that need neither GPU nor compiler: what was compiled is kept, and the
//! architecture is chosen.

use candle_core::Result;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Values that were made for keys. Each key has a lock of its own.
pub(crate) type Cache<K, V> = Mutex<HashMap<K, Arc<Mutex<Option<V>>>>>;

/// What was made for a key before, or else what `make` makes. While one thread makes the value of a key, threads that ask
/// for this key wait, and threads that ask for other keys do not. An error is not kept.
pub(crate) fn cached<K: Eq + Hash, V: Clone>(
    cache: &Cache<K, V>,
    key: K,
    make: impl FnOnce() -> Result<V>,
) -> Result<V> {
    let slot = lock(cache).entry(key).or_default().clone();
    let mut slot = lock(&slot);
    match &*slot {
        Some(value) => Ok(value.clone()),
        None => Ok(slot.insert(make()?).clone()),
    }
}

/// Locks, also after a panic of another thread: values are put in when they are complete.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The architecture to compile for: the newest of `supported` that is not newer than the device, because the driver
/// translates PTX for older architectures. If there is none, it is the device's own. Architectures are numbers like 90 for the
/// compute capability 9.0.
#[cfg(any(feature = "cuda", test))]
pub(crate) fn choose_architecture(device: i32, supported: &[i32]) -> i32 {
    supported.iter().copied().filter(|&supported| supported <= device).max().unwrap_or(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_not_kept_and_a_value_is() -> Result<()> {
        let cache = Cache::default();
        let failure = cached(&cache, "key", || Err(candle_core::Error::Msg("failed".into())));
        assert_eq!(failure.map_err(|error| error.to_string()), Err::<i32, _>("failed".into()));
        assert_eq!(cached(&cache, "key", || Ok(1))?, 1);
        assert_eq!(cached(&cache, "key", || Ok(2))?, 1);
        assert_eq!(cached(&cache, "other", || Ok(3))?, 3);
        Ok(())
    }

    #[test]
    fn the_newest_architecture_not_newer_than_the_device() {
        let supported = [75, 80, 86, 89, 90];
        assert_eq!(choose_architecture(86, &supported), 86);
        assert_eq!(choose_architecture(87, &supported), 86);
        assert_eq!(choose_architecture(120, &supported), 90);
        assert_eq!(choose_architecture(120, &[90, 75, 80]), 90);
        assert_eq!(choose_architecture(70, &supported), 70);
        assert_eq!(choose_architecture(90, &[]), 90);
    }

    #[cfg(not(target_family = "wasm"))]
    mod threads {
        use super::*;
        use std::sync::atomic::{AtomicUsize, Ordering};
        use std::thread;
        use std::time::{Duration, Instant};

        /// Waits until a number is reached, for 20 s at most.
        fn reaches(number: &AtomicUsize, expected: usize) -> bool {
            let start = Instant::now();
            while number.load(Ordering::SeqCst) < expected {
                if start.elapsed() > Duration::from_secs(20) {
                    return false;
                }
                thread::yield_now();
            }
            true
        }

        #[test]
        fn other_keys_are_made_side_by_side() {
            let (cache, begun) = (Cache::default(), AtomicUsize::new(0));
            let make = || {
                begun.fetch_add(1, Ordering::SeqCst);
                Ok(reaches(&begun, 2))
            };
            let other_began = |key| matches!(cached(&cache, key, make), Ok(true));
            thread::scope(|scope| {
                for key in [0, 1] {
                    scope.spawn(move || assert!(other_began(key), "a key waited for the other"));
                }
            });
        }

        #[test]
        fn one_key_is_made_once() {
            let (cache, asked, made) = (Cache::default(), AtomicUsize::new(0), AtomicUsize::new(0));
            let make = || {
                // The other threads get time to find no value.
                reaches(&asked, 4);
                thread::sleep(Duration::from_millis(20));
                Ok(made.fetch_add(1, Ordering::SeqCst))
            };
            let is_first = || {
                asked.fetch_add(1, Ordering::SeqCst);
                matches!(cached(&cache, (), make), Ok(0))
            };
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| assert!(is_first(), "the value was made twice"));
                }
            });
            assert_eq!(made.load(Ordering::SeqCst), 1);
        }
    }
}
