//! The fuzz target for manifests. See [`cowl_layers::fuzzing`].

use super::family::StoreList;
use super::manifest::{ContainerManifest, LayerManifest, SnapshotManifest, StoreManifest};
use super::record::{Body, Record};
use serde_json::{Map, Value};

/// Parses each kind of manifest, with its envelope and without.
///
/// A manifest that is parsed is the same after it was written and parsed again.
pub fn manifests(data: &[u8]) {
    both::<StoreManifest>(data);
    both::<SnapshotManifest>(data);
    both::<LayerManifest>(data);
    both::<StoreList>(data);
    if let Some(container) = both::<ContainerManifest>(data)
        && container.check().is_ok()
    {
        assert_eq!(container.below_head().len() + 1, container.stack.len());
    }
}

fn both<T: Body + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<T> {
    if let Ok(record) = Record::<T>::decode(data) {
        round_trip(record);
    }
    // A fuzzer cannot compute a checksum.
    let mut object: Map<String, Value> = serde_json::from_slice(data).ok()?;
    object.retain(|key, _| !["checksum", "format", "generation"].contains(&key.as_str()));
    let body: T = serde_json::from_value(Value::Object(object)).ok()?;
    Some(round_trip(Record::first(body)))
}

fn round_trip<T: Body + PartialEq + std::fmt::Debug>(record: Record<T>) -> T {
    let bytes = record.encode().unwrap_or_default();
    let again = Record::<T>::decode(&bytes).ok();
    assert_eq!(again.as_ref(), Some(&record));
    record.body
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_is_replayed() {
        cowl_layers::fuzzing::replay("manifests", super::manifests);
    }
}
