//! The gRPC service: converts messages, and runs requests outside of the threads that serve connections.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cowl::lifecycle::containerd::SnapshotBind;
use cowl::store::containerd::{ContainerdKind, ContainerdRecord};
use jiff::Timestamp;
use tokio::sync::mpsc::Sender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::error::{RequestError, Result};
use crate::filter::Filters;
use crate::index::{Obstacle, Part};
use crate::manager::{Manager, Operation};
use crate::messages::{
    CleanupRequest, CommitRequest, Empty, InfoList, InfoReply, KeyRequest, ListRequest, Mount,
    MountList, PrepareRequest, SnapshotInfo, SnapshotKind, UpdateRequest, UsageReply,
};
use crate::operations::{CleanUp, Commit, Labels, Mounts, Prepare, Remove, Split, Update, Usage};
use crate::server::snapshots_server::Snapshots;

/// The number of requests that use the store at the same time.
const MAX_RUNNING: usize = 16;

/// The time for which a request waits for another one on the same snapshot.
const PATIENCE: Duration = Duration::from_secs(60);

/// The number of snapshots that a message of a list is selected from.
const LIST_PART: usize = 100;

/// The service of a store.
#[derive(Debug)]
pub(crate) struct Service {
    manager: Arc<Manager>,
    running: Arc<Semaphore>,
}

type Reply<T> = std::result::Result<Response<T>, Status>;

impl Service {
    /// Creates the service of the snapshots of `manager`.
    pub(crate) fn new(manager: Arc<Manager>) -> Self {
        Self {
            manager,
            running: Arc::new(Semaphore::new(MAX_RUNNING)),
        }
    }

    /// Runs a request on a thread of its own. Once it has begun, it is completed even if the client disconnects.
    async fn run<O: Operation>(&self, operation: O) -> Result<O::Done, Status> {
        let (permit, begun) = self.begin(&operation).await?;
        // No `await` before the thread has the request: a future that is dropped there would leave the keys reserved.
        let manager = Arc::clone(&self.manager);
        let done = spawn_blocking(move || {
            let done = operation.perform(&manager, begun);
            drop(permit);
            done
        });
        let done = done.await.map_err(|error| {
            log::error!("a request has panicked: {error}");
            Status::internal(
                "the request has failed because of a bug of cowl-snapshotter; see its log",
            )
        })?;
        done.map_err(refuse)
    }

    /// Begins a request. While it waits for another one on its key, it does not count among those that use the store.
    async fn begin<O: Operation>(
        &self,
        operation: &O,
    ) -> Result<(OwnedSemaphorePermit, O::Begun), Status> {
        let mut deadline = None;
        loop {
            // Before the attempt, so that no end after it is missed.
            let ended = self.manager.ended();
            let permit = Arc::clone(&self.running).acquire_owned().await;
            let permit =
                permit.map_err(|_| Status::unavailable("the snapshotter is shutting down"))?;
            let key = match self.manager.begin(operation) {
                Ok(begun) => return Ok((permit, begun)),
                Err(Obstacle::Refused(error)) => return Err(refuse(error)),
                Err(Obstacle::Wait(key)) => key,
            };
            drop(permit);
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            if timeout_at(deadline, ended).await.is_err() {
                return Err(refuse(operation.still_running(&key)));
            }
        }
    }

    /// Recreates an active snapshot if it was committed and containerd may not have recorded the commit.
    async fn split(&self, key: &str) -> Result<(), Status> {
        let key = key.to_owned();
        self.run(Split { key }).await
    }

    async fn prepare(&self, request: PrepareRequest, kind: ContainerdKind) -> Reply<MountList> {
        let PrepareRequest {
            key,
            parent,
            labels,
            ..
        } = request;
        let operation = Prepare {
            key,
            kind,
            parent: Some(parent).filter(|parent| !parent.is_empty()),
            labels: sorted(labels),
        };
        let key = operation.key.clone();
        let bind = self.run(operation).await?;
        if self.manager.is_unpacked(&key) {
            tokio::spawn(sync_while_unpacked(Arc::clone(&self.manager), key));
        }
        Ok(Response::new(mount_list(&bind)?))
    }
}

/// Syncs what containerd unpacks until the snapshot is committed: containerd holds the lock of its database during the sync
/// of the commit.
///
/// Ends after ten minutes: the snapshot of an interrupted unpacking can remain for a day.
async fn sync_while_unpacked(manager: Arc<Manager>, key: String) {
    for _ in 0..600 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        if !manager.is_unpacked(&key) {
            return;
        }
        let syncing = Arc::clone(&manager);
        if let Err(error) = spawn_blocking(move || syncing.sync_early()).await {
            log::error!("a sync has panicked: {error}");
            return;
        }
    }
}

/// Converts the error of a request to a status, and logs it.
fn refuse(error: RequestError) -> Status {
    log::debug!("{error}");
    Status::from(error)
}

#[tonic::async_trait]
impl Snapshots for Service {
    async fn prepare(&self, request: Request<PrepareRequest>) -> Reply<MountList> {
        self.prepare(request.into_inner(), ContainerdKind::Active)
            .await
    }

    async fn view(&self, request: Request<PrepareRequest>) -> Reply<MountList> {
        self.prepare(request.into_inner(), ContainerdKind::View)
            .await
    }

    async fn mounts(&self, request: Request<KeyRequest>) -> Reply<MountList> {
        let KeyRequest { key, .. } = request.into_inner();
        self.split(&key).await?;
        let bind = self.run(Mounts { key }).await?;
        Ok(Response::new(mount_list(&bind)?))
    }

    async fn commit(&self, request: Request<CommitRequest>) -> Reply<Empty> {
        let CommitRequest {
            name, key, labels, ..
        } = request.into_inner();
        let labels = sorted(labels);
        let operation = Commit {
            key,
            new: name,
            labels,
        };
        self.run(operation).await?;
        Ok(Response::new(Empty {}))
    }

    async fn remove(&self, request: Request<KeyRequest>) -> Reply<Empty> {
        let KeyRequest { key, .. } = request.into_inner();
        self.run(Remove { key }).await?;
        Ok(Response::new(Empty {}))
    }

    async fn stat(&self, request: Request<KeyRequest>) -> Reply<InfoReply> {
        let record = self.manager.stat(&request.into_inner().key)?;
        Ok(Response::new(info_reply(record)))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Reply<InfoReply> {
        let UpdateRequest {
            info, update_mask, ..
        } = request.into_inner();
        let info =
            info.ok_or_else(|| Status::invalid_argument("the new properties are missing"))?;
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let edit = LabelEdit::parse(fields, info.labels)?;
        let key = info.name;
        self.split(&key).await?;
        let edit = move |labels| edit.apply(labels);
        let record = self.run(Update { key, edit }).await?;
        Ok(Response::new(info_reply(record)))
    }

    type ListStream = InfoStream;

    async fn list(&self, request: Request<ListRequest>) -> Reply<InfoStream> {
        let filters = Filters::parse(&request.into_inner().filters)?;
        Ok(Response::new(list(Arc::clone(&self.manager), filters)))
    }

    async fn usage(&self, request: Request<KeyRequest>) -> Reply<UsageReply> {
        let KeyRequest { key, .. } = request.into_inner();
        let usage = self.run(Usage { key }).await?;
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(UsageReply {
            size: number(usage.bytes),
            inodes: number(usage.inodes),
        }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Reply<Empty> {
        self.run(CleanUp).await?;
        Ok(Response::new(Empty {}))
    }
}

/// A list of snapshots in parts.
type InfoStream = std::pin::Pin<Box<dyn Stream<Item = Result<InfoList, Status>> + Send>>;

/// Lists snapshots in the order of their keys, without a copy of the whole list: each part is read when the client has
/// received the one before. Snapshots that are created or removed in the meantime may be listed or not.
fn list(manager: Arc<Manager>, filters: Filters) -> InfoStream {
    let (send, receive) = tokio::sync::mpsc::channel(1);
    // Ends with the stream.
    tokio::spawn(send_list(manager, Arc::new(filters), send));
    Box::pin(ReceiverStream::new(receive))
}

/// Sends the parts of a list. They are filtered outside of the threads that serve connections.
async fn send_list(
    manager: Arc<Manager>,
    filters: Arc<Filters>,
    send: Sender<Result<InfoList, Status>>,
) {
    // containerd removes snapshots in the order of the list. If it knows neither snapshot of a commit, that of the active one
    // has to be removed first: otherwise the removal of the other one would create it again.
    let mut parts = [Part::Uncommitted, Part::Existing].into_iter();
    let (mut now, mut after) = (parts.next(), None::<String>);
    while let Some(part) = now
        && !send.is_closed()
    {
        let (manager, filters) = (Arc::clone(&manager), Arc::clone(&filters));
        let found =
            spawn_blocking(move || manager.list(&filters, part, after.as_deref(), LIST_PART));
        let (found, last) = match found.await {
            Ok(part) => part,
            Err(error) => {
                log::error!("a list has panicked: {error}");
                let status = Status::internal("the list has failed; see the log");
                // The client may have gone.
                send.send(Err(status)).await.ok();
                return;
            }
        };
        if last.is_none() {
            now = parts.next();
        }
        after = last;
        let info: Vec<_> = found.into_iter().map(info).collect();
        if !info.is_empty() && send.send(Ok(InfoList { info })).await.is_err() {
            return;
        }
    }
}

/// A change of labels.
#[derive(Debug, PartialEq, Eq)]
enum LabelEdit {
    /// All labels are replaced.
    Replace(Labels),
    /// These labels get a value, or are removed.
    Set(Vec<(String, Option<String>)>),
}

impl LabelEdit {
    /// Parses the field mask of an update, which may contain "labels" and "labels.KEY".
    fn parse(fields: Vec<String>, mut labels: HashMap<String, String>) -> Result<Self> {
        let mut set = Vec::new();
        for field in &fields {
            if field == "labels" {
                return Ok(Self::Replace(sorted(labels)));
            }
            let Some(key) = field.strip_prefix("labels.") else {
                return Err(RequestError::Invalid(format!(
                    "the field {field:?} cannot be changed"
                )));
            };
            let value = labels.remove(key).filter(|value| !value.is_empty());
            set.push((key.to_owned(), value));
        }
        Ok(match fields.is_empty() {
            true => Self::Replace(sorted(labels)),
            false => Self::Set(set),
        })
    }

    fn apply(self, mut labels: Labels) -> Labels {
        match self {
            Self::Replace(labels) => labels,
            Self::Set(changes) => {
                for (key, value) in changes {
                    match value {
                        Some(value) => labels.insert(key, value),
                        None => labels.remove(&key),
                    };
                }
                labels
            }
        }
    }
}

fn sorted(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn mount_list(bind: &SnapshotBind) -> Result<MountList, Status> {
    let source = bind.source.to_str().ok_or_else(|| {
        Status::failed_precondition("the path of the store is not valid UTF-8, which gRPC requires")
    })?;
    let access = if bind.read_only { "ro" } else { "rw" };
    Ok(MountList {
        mounts: vec![Mount {
            r#type: "bind".to_owned(),
            source: source.to_owned(),
            target: String::new(),
            options: vec!["rbind".to_owned(), access.to_owned()],
        }],
    })
}

fn info_reply(record: ContainerdRecord) -> InfoReply {
    InfoReply {
        info: Some(info(record)),
    }
}

fn info(record: ContainerdRecord) -> SnapshotInfo {
    let kind = match record.kind {
        ContainerdKind::View => SnapshotKind::View,
        ContainerdKind::Active => SnapshotKind::Active,
        ContainerdKind::Committed => SnapshotKind::Committed,
    };
    SnapshotInfo {
        name: record.key,
        parent: record.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: timestamp(&record.created),
        updated_at: timestamp(&record.updated),
        labels: record.labels.into_iter().collect(),
    }
}

/// Converts a time to a message; an invalid one is absent.
fn timestamp(time: &str) -> Option<prost_types::Timestamp> {
    let time: Timestamp = time.parse().ok()?;
    Some(prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: time.subsec_nanosecond(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> Labels {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn labels_are_updated_by_field_masks() {
        let old = map(&[("a", "1"), ("b.c", "2")]);
        for (fields, new, expected) in [
            (&[][..], map(&[("x", "9")]), map(&[("x", "9")])),
            (&["labels"], map(&[("x", "9")]), map(&[("x", "9")])),
            (
                &["labels.a"],
                map(&[("a", "3")]),
                map(&[("a", "3"), ("b.c", "2")]),
            ),
            (&["labels.b.c"], map(&[]), map(&[("a", "1")])),
            (
                &["labels.d"],
                map(&[("d", "4"), ("a", "5")]),
                map(&[("a", "1"), ("b.c", "2"), ("d", "4")]),
            ),
        ] {
            let fields = fields.iter().map(|f| (*f).to_owned()).collect();
            let edit = LabelEdit::parse(fields, new.into_iter().collect()).unwrap();
            assert_eq!(edit.apply(old.clone()), expected);
        }
        for field in ["parent", "name", "kind", "", "label"] {
            let error = LabelEdit::parse(vec![field.to_owned()], HashMap::new()).unwrap_err();
            assert!(matches!(error, RequestError::Invalid(_)), "{field}");
        }
    }

    #[test]
    fn times_keep_their_nanoseconds() {
        let time = timestamp("2026-11-24T12:00:00.000000001Z").unwrap();
        assert_eq!(time.nanos, 1);
        assert_eq!(timestamp("yesterday"), None);
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod requests;
