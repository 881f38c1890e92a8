//! The conversation of a sender and a receiver over a connection, and the list of layers that a receiver has.
//!
//! The sender offers the ids of its layers. The receiver replies with the identities of those that it has. The sender
//! sends the rest in frames, and the receiver confirms the commit. Each message is one line of JSON. Everything that the
//! other side sends is untrusted: a wrong reply can only make the transfer fail, because the receiver verifies each layer.

use std::collections::HashSet;
use std::io::{BufRead, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frames::{FrameReader, FrameWriter};
use super::{ChosenStates, KnownToReceiver, Outgoing, Received};
use crate::archive::Compression;
use crate::archive::bundle::BundleReader;
use crate::archive::input::{self, Input};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::held::HeldLayers;
use crate::store::identity::KnownLayers;
use crate::store::manifest::{LayerId, LayerIdentity, SnapshotId};
use crate::store::name::{ContainerName, SnapshotName};
use crate::tree::error::{ErrorKind, OnProgress};
use cowl_layers::shown::Show as _;

/// The version of the conversation and of the list.
const VERSION: u32 = 1;

/// The maximum length of a line in bytes: about 100,000 layers.
const MAX_LINE: u64 = 16 << 20;

/// The first message of the sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    cowl: u32,
    /// The name of the container that is sent.
    pub container: ContainerName,
    /// The ids of its layers across stores.
    layers: Vec<LayerId>,
}

/// The layers that a store has, and the snapshots of a container that were removed from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HaveList {
    cowl: u32,
    layers: Vec<LayerIdentity>,
    /// Snapshots that the container had received, and that must not be sent again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    removed: Vec<SnapshotId>,
}

/// The last message of the receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmation {
    cowl: u32,
    /// The name of the container there.
    pub container: ContainerName,
    /// The snapshots that were added: the name that was sent, and the name there.
    pub snapshots: Vec<(SnapshotName, SnapshotName)>,
    /// The number of sent snapshots that the container had already.
    pub present: usize,
    /// The number of those of them whose comments, tags or protection were changed.
    #[serde(default)]
    pub changed: usize,
}

/// A message with a version.
trait Message: Serialize + DeserializeOwned {
    fn version(&self) -> u32;
}

impl Message for Offer {
    fn version(&self) -> u32 {
        self.cowl
    }
}

impl Message for HaveList {
    fn version(&self) -> u32 {
        self.cowl
    }
}

impl Message for Confirmation {
    fn version(&self) -> u32 {
        self.cowl
    }
}

/// The list of a receiver without a store.
impl Default for HaveList {
    fn default() -> Self {
        Self::new(Vec::new(), Vec::new())
    }
}

impl HaveList {
    /// Lists all layers of a store that have an identity, and the removed snapshots of a container. The store may change
    /// afterwards.
    pub fn of_store(store: &Store, removed: Vec<SnapshotId>) -> Result<Self> {
        let _reading = store.lock_shared()?;
        Ok(Self::new(KnownLayers::read(store)?.identities(), removed))
    }

    fn new(layers: Vec<LayerIdentity>, removed: Vec<SnapshotId>) -> Self {
        Self {
            cowl: VERSION,
            layers,
            removed,
        }
    }

    /// Reads a list from a file.
    pub fn read(input: &mut impl BufRead) -> Result<Self> {
        read_line(input, "list of layers")
    }

    /// Returns the list as one line of JSON.
    pub fn to_line(&self) -> Result<String> {
        to_line(self)
    }

    /// Returns the list for a sender.
    pub fn known(self) -> KnownToReceiver {
        KnownToReceiver::new(self.layers, self.removed)
    }
}

/// Sends states to a receiver that replies. Returns what it confirms, and what was sent.
pub fn send(
    store: &Store,
    chosen: ChosenStates,
    name: &ContainerName,
    (input, mut output): (&mut impl BufRead, impl Write),
    (compression, progress): (Compression, OnProgress<'_>),
) -> Result<(Confirmation, Outgoing)> {
    let offer = Offer {
        cowl: VERSION,
        container: name.clone(),
        layers: chosen.ids_across_stores(store)?,
    };
    let offered = write_line(&mut output, &offer);
    // If the receiver has ended, what it has written explains more than the failed write.
    let have: HaveList = read_line(input, "receiver's reply")?;
    offered?;
    let outgoing = Outgoing::prepare_transfer(store, chosen, &have.known(), progress)?;
    let mut frames = FrameWriter(output);
    outgoing.write(store, &mut frames, compression, progress)?;
    frames.finish().map_err(cannot_send)?;
    let confirmation: Result<Confirmation> = read_line(input, "receiver's confirmation");
    // The receiver may have committed before the connection was cut.
    let confirmation = confirmation.map_err(|error| {
        error.hint(
            "the other side may have stored everything: repeat the command, which sends only what is missing there",
        )
    })?;
    Ok((confirmation, outgoing))
}

/// A receiver's side of the conversation, after the sender's offer.
#[derive(Debug)]
pub struct Accepted {
    /// The offer.
    pub offer: Offer,
}

impl Accepted {
    /// Reads the offer.
    pub fn read(input: &mut impl BufRead) -> Result<Self> {
        let offer = read_line(input, "sender's offer")?;
        Ok(Self { offer })
    }

    /// Replies with the layers that the store has, and with the snapshots that must not be sent; receives the archive, and
    /// confirms what `receive` has committed.
    ///
    /// The layers in the reply are retained until then.
    pub fn serve<R: BufRead>(
        &self,
        (store, removed): (&Store, Vec<SnapshotId>),
        (input, output): (&mut R, &mut impl Write),
        receive: impl FnOnce(BundleReader<'_>) -> Result<Received>,
    ) -> Result<Received> {
        let (have, _held) = self.reply(store, removed)?;
        write_line(output, &have)?;
        let mut frames = FrameReader::new(input);
        let received = receive(open_archive(&mut frames)?)?;
        let unconfirmed = |error| {
            let what = format!(
                "{} was received, but the sender cannot be notified of it",
                received.name
            );
            Error::failed(what)
                .hint("repeat the command, which sends nothing that is here already")
                .because(error)
        };
        // Compressed data may be followed by more frames.
        frames.skip_rest().map_err(unconfirmed)?;
        let snapshots = received.added.iter();
        let confirmation = Confirmation {
            cowl: VERSION,
            container: received.name.clone(),
            snapshots: snapshots
                .map(|added| (added.sent_as.clone(), added.name.clone()))
                .collect(),
            present: received.present,
            changed: (received.changed.iter())
                .filter(|changed| !changed.changes.is_empty())
                .count(),
        };
        let line = to_line(&confirmation)? + "\n";
        (output.write_all(line.as_bytes()))
            .and_then(|()| output.flush())
            .map_err(unconfirmed)?;
        Ok(received)
    }

    /// Returns the offered layers that the store has, which are held.
    fn reply(&self, store: &Store, removed: Vec<SnapshotId>) -> Result<(HaveList, HeldLayers)> {
        let _reading = store.lock_shared()?;
        let offered: HashSet<_> = self.offer.layers.iter().collect();
        let known = KnownLayers::read(store)?;
        let mut held = HeldLayers::new();
        let mut layers = Vec::new();
        for identity in known.identities() {
            if offered.contains(&identity.id)
                && let Some(id) = known.find(&identity)
                && held.hold(store, id)?
            {
                layers.push(identity);
            }
        }
        Ok((HaveList::new(layers, removed), held))
    }
}

/// Opens a stream of `cowl send`, or an archive of `cowl export --with-snapshots`.
pub fn open_archive<'a>(stream: impl Read + 'a) -> Result<BundleReader<'a>> {
    let opened = input::open(stream).map_err(|error| match error.kind() {
        ErrorKind::Empty => Error::failed("nothing was sent")
            .hint("the sender reports the reason; if it did not run, check the pipe or the file"),
        _ => error.into(),
    });
    match opened? {
        Input::Container(archive) => Ok(archive),
        Input::Tree(_) => Err(Error::failed(
            "this is not what `cowl send` writes, but an archive of files",
        )
        .hint("import it: cowl import FILE NAME")),
    }
}

fn to_line(message: &impl Serialize) -> Result<String> {
    serde_json::to_string(message)
        .map_err(|error| Error::failed("cannot write a message").because(error))
}

fn write_line(output: &mut impl Write, message: &impl Message) -> Result<()> {
    let line = to_line(message)? + "\n";
    output
        .write_all(line.as_bytes())
        .and_then(|()| output.flush())
        .map_err(cannot_send)
}

fn cannot_send(error: std::io::Error) -> Error {
    Error::failed("cannot send to the other side").because(error)
}

/// Reads a line of JSON; `what` is its description.
fn read_line<T: Message>(input: &mut impl BufRead, what: &str) -> Result<T> {
    let mut line = Vec::new();
    input
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)
        .map_err(|error| Error::failed(format!("cannot read the {what}")).because(error))?;
    if line.is_empty() {
        return Err(
            Error::failed(format!("the connection ended before the {what}"))
                .hint("the other side reports the reason, if it was started"),
        );
    }
    let refused = |reason: String| Err(Error::failed(format!("cannot use the {what}: {reason}")));
    match serde_json::from_slice::<T>(&line) {
        Ok(message) if message.version() == VERSION => Ok(message),
        Ok(message) => {
            let version = message.version();
            refused(format!(
                "it has version {version}, this cowl has version {VERSION}"
            ))
        }
        Err(_) if line.len() as u64 == MAX_LINE => {
            refused(format!("it has more than {} MiB", MAX_LINE >> 20))
        }
        Err(_) if line.starts_with(b"{") && !line.ends_with(b"\n") => {
            refused("it is incomplete".to_owned())
        }
        Err(_) => {
            let first = line.get(..line.len().min(60)).unwrap_or_default();
            let first = first.trim_ascii_end().shown();
            refused(format!(
                "it begins with \"{first}\"; does the shell of the other side print something at its start?"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_other_side_are_checked() {
        let list = HaveList::default().to_line().unwrap();
        assert_eq!(list, r#"{"cowl":1,"layers":[]}"#);
        let read = |line: &[u8]| HaveList::read(&mut &line[..]).map_err(|error| error.to_string());
        assert_eq!(read(list.as_bytes()), Ok(HaveList::default()));
        for (line, expected) in [
            (&b""[..], "ended before"),
            (br#"{"cowl":2,"layers":[]}"#, "version 2"),
            (b"Last login\x1b[2J: today\n", r"Last login\x1b[2J: today"),
            (
                b"{\"cowl\":1,\"layers\":[{\"id\":\"../x\",\"digest\":\"layer1:\"}]}\n",
                "begins with",
            ),
            (b"{\"cowl\":1}\n", "begins with"),
            (br#"{"cowl":1,"layers":["#, "is incomplete"),
            (
                &[b"{".as_slice(), &vec![b' '; 16 << 20]].concat(),
                "more than 16 MiB",
            ),
        ] {
            let error = read(line).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains('\x1b'));
        }
        // A line without an end is read up to the limit only.
        let mut endless = std::io::BufReader::new(std::io::repeat(b' '));
        HaveList::read(&mut endless).unwrap_err();
    }
}
