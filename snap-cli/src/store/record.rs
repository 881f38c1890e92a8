//! The envelope of all manifests: format, generation and checksum around a JSON body. Pure: converts between bytes and
//! values.
//!
//! The checksum is the SHA-256 of the compact JSON with sorted keys, without the checksum itself. So it covers fields
//! that this version does not know, and does not depend on indentation.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// A type that can be stored in an envelope.
pub trait Body: Serialize + DeserializeOwned {
    /// The name of the type in messages.
    const TYPE_NAME: &'static str;
    /// The newest format that this version supports.
    const FORMAT: u64 = 1;

    /// Returns the oldest format that contains all of the body's meaning. Older versions refuse the record.
    fn format(&self) -> u64 {
        1
    }
}

/// A body with its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<T> {
    /// The number of writes, this one included.
    pub generation: u64,
    /// The body.
    pub body: T,
}

/// An error in a record's bytes.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The bytes are not a JSON object.
    #[error("it is not a JSON object{0}")]
    Syntax(String),
    /// A newer version wrote the record.
    #[error("it has format {found}, but this version supports only formats up to {known}")]
    Newer {
        /// The format of the record.
        found: u64,
        /// The newest supported format.
        known: u64,
    },
    /// The checksum does not match.
    #[error("its checksum is wrong")]
    Checksum,
    /// A field is missing or wrong.
    #[error("{0}")]
    Shape(String),
}

const FORMAT: &str = "format";
const GENERATION: &str = "generation";
const CHECKSUM: &str = "checksum";

/// Computes the checksum of an object without its checksum field.
fn compute_checksum(object: &Map<String, Value>) -> Result<String, RecordError> {
    let bytes = serde_json::to_vec(object).map_err(|e| RecordError::Shape(e.to_string()))?;
    let hex: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!("sha256:{hex}"))
}

impl<T: Body> Record<T> {
    /// Creates a record of generation 1.
    pub fn first(body: T) -> Self {
        Self {
            generation: 1,
            body,
        }
    }

    /// Creates the record of the next generation, with another body.
    pub fn next(&self, body: T) -> Self {
        Self {
            generation: self.generation.saturating_add(1),
            body,
        }
    }

    /// Returns the bytes to write.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let shape = |e: serde_json::Error| RecordError::Shape(e.to_string());
        let Value::Object(mut object) = serde_json::to_value(&self.body).map_err(shape)? else {
            return Err(RecordError::Syntax(String::new()));
        };
        object.insert(FORMAT.to_owned(), self.body.format().into());
        object.insert(GENERATION.to_owned(), self.generation.into());
        let sum = compute_checksum(&object)?;
        object.insert(CHECKSUM.to_owned(), sum.into());
        // Otherwise it could not be read again.
        if !object
            .values()
            .all(|value| is_within_depth(value, MAX_DEPTH))
        {
            let what = "values are nested too deeply".to_owned();
            return Err(RecordError::Shape(what));
        }
        let mut bytes = serde_json::to_vec_pretty(&object).map_err(shape)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Parses bytes that [`Record::encode`] returned, in this or an older version.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| RecordError::Syntax(format!(" ({error})")))?;
        let Value::Object(mut object) = value else {
            return Err(RecordError::Syntax(String::new()));
        };
        // Check the format first: a newer one may have another checksum.
        let format = read_number(&object, FORMAT)?;
        if format > T::FORMAT {
            return Err(RecordError::Newer {
                found: format,
                known: T::FORMAT,
            });
        }
        let Some(Value::String(sum)) = object.remove(CHECKSUM) else {
            return Err(RecordError::Shape(format!("\"{CHECKSUM}\" is missing")));
        };
        if compute_checksum(&object)? != sum {
            return Err(RecordError::Checksum);
        }
        let generation = read_number(&object, GENERATION)?;
        object.remove(FORMAT);
        object.remove(GENERATION);
        let body = serde_json::from_value(Value::Object(object))
            .map_err(|error| RecordError::Shape(error.to_string()))?;
        Ok(Self { generation, body })
    }
}

/// Returns the number in a field.
fn read_number(object: &Map<String, Value>, key: &str) -> Result<u64, RecordError> {
    object
        .get(key)
        .and_then(Value::as_u64)
        .ok_or_else(|| RecordError::Shape(format!("\"{key}\" is missing or not a number")))
}

/// The depth to which values in a record may be nested. serde_json reads at most 127 levels, and the record itself can be
/// a part of another document.
const MAX_DEPTH: usize = 124;

/// Whether a value is nested at most `left` levels deep.
fn is_within_depth(value: &Value, left: usize) -> bool {
    let is_below = |below: &Value| is_within_depth(below, left.saturating_sub(1));
    match value {
        Value::Array(all) => left > 0 && all.iter().all(is_below),
        Value::Object(all) => left > 0 && all.values().all(is_below),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Thing {
        name: String,
        #[serde(flatten)]
        extra: Map<String, Value>,
    }

    impl Body for Thing {
        const TYPE_NAME: &'static str = "thing";
    }

    fn thing() -> Record<Thing> {
        Record::first(Thing {
            name: "x".to_owned(),
            extra: Map::new(),
        })
    }

    fn with(key: &str, value: Value) -> Vec<u8> {
        let mut value_map: Map<String, Value> =
            serde_json::from_slice(&thing().encode().unwrap()).unwrap();
        value_map.insert(key.to_owned(), value);
        serde_json::to_vec(&value_map).unwrap()
    }

    #[test]
    fn a_record_round_trips() {
        let one = thing().next(thing().body);
        assert_eq!(one.generation, 2);
        assert_eq!(Record::decode(&one.encode().unwrap()).unwrap(), one);
    }

    #[test]
    fn fields_of_a_newer_version_are_preserved() {
        let mut object: Map<String, Value> =
            serde_json::from_slice(&thing().encode().unwrap()).unwrap();
        object.remove(CHECKSUM);
        object.insert("colour".to_owned(), serde_json::json!({"deep": [1, 2]}));
        let sum = compute_checksum(&object).unwrap();
        object.insert(CHECKSUM.to_owned(), sum.into());
        let read = Record::<Thing>::decode(&serde_json::to_vec(&object).unwrap()).unwrap();
        let again = Record::<Thing>::decode(&read.encode().unwrap()).unwrap();
        assert_eq!(again.body.extra["colour"]["deep"][1], 2);
    }

    #[test]
    fn invalid_records_are_refused() {
        let refused = |bytes: &[u8]| Record::<Thing>::decode(bytes).unwrap_err();
        assert!(matches!(refused(b""), RecordError::Syntax(_)));
        assert!(matches!(refused(b"[]"), RecordError::Syntax(_)));
        assert!(matches!(refused(b"{\"format\":1"), RecordError::Syntax(_)));
        assert!(matches!(refused(b"{}"), RecordError::Shape(_)));
        assert!(matches!(refused(b"{\"format\":1}"), RecordError::Shape(_)));
        assert!(matches!(
            refused(&with("name", "y".into())),
            RecordError::Checksum
        ));
        assert!(matches!(
            refused(&with("new", 1.into())),
            RecordError::Checksum
        ));
        assert!(matches!(
            refused(&with(CHECKSUM, "sha256:00".into())),
            RecordError::Checksum
        ));
        assert!(matches!(
            refused(&with(FORMAT, 2.into())),
            RecordError::Newer { found: 2, known: 1 }
        ));
        let whole = thing().encode().unwrap();
        for cut in 0..whole.len() - 2 {
            assert!(Record::<Thing>::decode(&whole[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn unreadable_records_are_not_written() {
        let nested = |depth: usize| {
            let mut record = thing();
            let mut value = Value::Null;
            for _ in 0..depth {
                value = Value::Array(vec![value]);
            }
            record.body.extra.insert("x".to_owned(), value);
            record.encode()
        };
        assert!(nested(124).is_ok());
        for depth in [127, 128, 200] {
            assert!(nested(depth).is_err(), "{depth}");
        }
    }

    #[test]
    fn indentation_does_not_matter() {
        let value: Value = serde_json::from_slice(&thing().encode().unwrap()).unwrap();
        let compact = serde_json::to_vec(&value).unwrap();
        assert_eq!(Record::decode(&compact).unwrap(), thing());
    }
}
