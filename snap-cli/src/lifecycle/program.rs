//! The process that the image of a container defines: its command, environment, user and directory.

use std::ffi::OsString;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::store::image_record::ImageRecord;

/// The process of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageProgram {
    /// The program and its arguments: Entrypoint and Cmd.
    pub command: Vec<OsString>,
    /// The variables of the environment: names and values.
    pub environment: Vec<(String, String)>,
    /// `USER[:GROUP]`, names or numbers.
    pub user: Option<String>,
    /// The working directory.
    pub directory: Option<String>,
}

impl ImageProgram {
    /// Reads the process from the config of an image.
    pub fn of_image(image: &ImageRecord) -> Result<Self> {
        let config = &image.config;
        let mut command = texts(config, "Entrypoint")?;
        command.extend(texts(config, "Cmd")?);
        let mut environment = Vec::new();
        for variable in texts(config, "Env")? {
            match variable.split_once('=') {
                Some((name, value)) if !name.is_empty() => {
                    environment.push((name.to_owned(), value.to_owned()));
                }
                _ => return Err(invalid("Env")),
            }
        }
        Ok(Self {
            command: command.into_iter().map(OsString::from).collect(),
            environment,
            user: text(config, "User")?,
            directory: text(config, "WorkingDir")?,
        })
    }
}

fn invalid(key: &str) -> Error {
    Error::failed(format!("{key} in the config of the image is invalid"))
}

/// Returns a text of the config; `None` if it is missing or empty.
fn text(config: &Map<String, Value>, key: &str) -> Result<Option<String>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if !text.contains('\0') => {
            Ok(Some(text.clone()).filter(|text| !text.is_empty()))
        }
        Some(_) => Err(invalid(key)),
    }
}

/// Returns a list of texts of the config.
fn texts(config: &Map<String, Value>, key: &str) -> Result<Vec<String>> {
    let list = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(invalid(key)),
    };
    let one = |value: &Value| match value {
        Value::String(text) if !text.contains('\0') => Ok(text.clone()),
        _ => Err(invalid(key)),
    };
    list.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::archive::image_source::Platform;

    fn program(config: Value) -> Result<ImageProgram> {
        ImageProgram::of_image(&ImageRecord {
            name: None,
            digest: None,
            platform: Platform::of_machine(),
            created: None,
            author: None,
            config: config.as_object().unwrap().clone(),
            history: Vec::new(),
            extra: Map::new(),
        })
    }

    #[test]
    fn the_process_is_read_from_the_config() {
        let all = json!({
            "Entrypoint": ["/init"], "Cmd": ["a", "b"], "Env": ["A=1=2", "B="], "User": "web:1",
            "WorkingDir": "/srv", "Healthcheck": {"Test": ["NONE"]},
        });
        let text = str::to_owned;
        assert_eq!(
            program(all).unwrap(),
            ImageProgram {
                command: ["/init", "a", "b"].map(OsString::from).to_vec(),
                environment: vec![(text("A"), text("1=2")), (text("B"), text(""))],
                user: Some(text("web:1")),
                directory: Some(text("/srv")),
            }
        );
        let none = json!({ "Entrypoint": null, "Cmd": null, "User": "", "WorkingDir": "" });
        assert_eq!(program(none).unwrap(), ImageProgram::default());
        for bad in [
            json!({ "Cmd": "sh" }),
            json!({ "Cmd": [1] }),
            json!({ "Cmd": ["a\0b"] }),
            json!({ "Env": ["A"] }),
            json!({ "Env": ["=1"] }),
            json!({ "User": 1 }),
        ] {
            assert!(program(bad.clone()).is_err(), "{bad}");
        }
    }
}
