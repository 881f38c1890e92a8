//! The envelope of every file that the store keeps: format, generation and checksum round a JSON body.
//! Pure: bytes in, values out.
//!
//! The checksum is SHA-256 over the compact JSON of everything but itself, keys sorted, so that it
//! covers also fields that this version does not know, and indentation does not matter.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

/// What can be kept in an envelope.
pub trait Body: Serialize + DeserializeOwned {
    /// What it is called in messages.
    const WHAT: &'static str;
    /// The newest format that this program knows.
    const FORMAT: u64 = 1;
}

/// A body with the number of times that it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<T> {
    /// Counts up with every write.
    pub generation: u64,
    /// What it says.
    pub body: T,
}

/// Why bytes are no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// No JSON object.
    #[error("it is not a JSON object{0}")]
    Syntax(String),
    /// Made by a newer version.
    #[error("it has format {found}, and this program knows formats up to {known}")]
    Newer {
        /// The format in the file.
        found: u64,
        /// The newest format known here.
        known: u64,
    },
    /// The checksum does not fit.
    #[error("its checksum is wrong")]
    Checksum,
    /// A field is missing or wrong.
    #[error("{0}")]
    Shape(String),
}

const FORMAT: &str = "format";
const GENERATION: &str = "generation";
const CHECKSUM: &str = "checksum";

fn checksum(object: &Map<String, Value>) -> Result<String, RecordError> {
    let bytes = serde_json::to_vec(object).map_err(|e| RecordError::Shape(e.to_string()))?;
    let hex: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!("sha256:{hex}"))
}

impl<T: Body> Record<T> {
    /// The first generation of something.
    pub fn first(body: T) -> Self {
        Self {
            generation: 1,
            body,
        }
    }

    /// The next generation, with another body.
    pub fn next(&self, body: T) -> Self {
        Self {
            generation: self.generation.saturating_add(1),
            body,
        }
    }

    /// The bytes to write.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let shape = |e: serde_json::Error| RecordError::Shape(e.to_string());
        let Value::Object(mut object) = serde_json::to_value(&self.body).map_err(shape)? else {
            return Err(RecordError::Syntax(String::new()));
        };
        object.insert(FORMAT.to_owned(), T::FORMAT.into());
        object.insert(GENERATION.to_owned(), self.generation.into());
        let sum = checksum(&object)?;
        object.insert(CHECKSUM.to_owned(), sum.into());
        let mut bytes = serde_json::to_vec_pretty(&object).map_err(shape)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads what [`Record::encode`] wrote, in this or an older version.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|error| RecordError::Syntax(format!(" ({error})")))?;
        let Value::Object(mut object) = value else {
            return Err(RecordError::Syntax(String::new()));
        };
        // The format comes first: a newer one may well sum in another way.
        let format = number(&object, FORMAT)?;
        if format > T::FORMAT {
            return Err(RecordError::Newer {
                found: format,
                known: T::FORMAT,
            });
        }
        let Some(Value::String(sum)) = object.remove(CHECKSUM) else {
            return Err(RecordError::Shape(format!("\"{CHECKSUM}\" is missing")));
        };
        if checksum(&object)? != sum {
            return Err(RecordError::Checksum);
        }
        let generation = number(&object, GENERATION)?;
        object.remove(FORMAT);
        object.remove(GENERATION);
        let body = serde_json::from_value(Value::Object(object))
            .map_err(|error| RecordError::Shape(error.to_string()))?;
        Ok(Self { generation, body })
    }
}

fn number(object: &Map<String, Value>, key: &str) -> Result<u64, RecordError> {
    object
        .get(key)
        .and_then(Value::as_u64)
        .ok_or_else(|| RecordError::Shape(format!("\"{key}\" is missing or no number")))
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
        const WHAT: &'static str = "thing";
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
    fn comes_back_as_it_was() {
        let one = thing().next(thing().body);
        assert_eq!(one.generation, 2);
        assert_eq!(Record::decode(&one.encode().unwrap()).unwrap(), one);
    }

    #[test]
    fn fields_of_a_later_version_stay() {
        let mut object: Map<String, Value> =
            serde_json::from_slice(&thing().encode().unwrap()).unwrap();
        object.remove(CHECKSUM);
        object.insert("colour".to_owned(), serde_json::json!({"deep": [1, 2]}));
        let sum = checksum(&object).unwrap();
        object.insert(CHECKSUM.to_owned(), sum.into());
        let read = Record::<Thing>::decode(&serde_json::to_vec(&object).unwrap()).unwrap();
        let again = Record::<Thing>::decode(&read.encode().unwrap()).unwrap();
        assert_eq!(again.body.extra["colour"]["deep"][1], 2);
    }

    #[test]
    fn what_is_refused() {
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
    fn indentation_does_not_matter() {
        let value: Value = serde_json::from_slice(&thing().encode().unwrap()).unwrap();
        let compact = serde_json::to_vec(&value).unwrap();
        assert_eq!(Record::decode(&compact).unwrap(), thing());
    }
}
