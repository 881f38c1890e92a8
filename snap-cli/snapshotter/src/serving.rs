//! Serves the connections of a socket until the process is asked to end.

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use cowl::{Error, Result};
use rustix::process::geteuid;
use tokio::net::UnixListener as AsyncListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::manager::Manager;
use crate::server::snapshots_server::SnapshotsServer;
use crate::service::Service;

/// The number of requests that a connection may have.
const MAX_REQUESTS: u32 = 256;

/// Serves requests until SIGTERM or SIGINT. Requests that run then are completed.
///
/// The socket's path remains: at this moment, it may already be that of the next process.
pub(crate) fn serve(socket: UnixListener, manager: Manager) -> Result<()> {
    let failed = |error: std::io::Error| Error::failed("cannot serve the socket").because(error);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        socket.set_nonblocking(true).map_err(failed)?;
        let socket = AsyncListener::from_std(socket).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let ended = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            log::info!("ending: waiting for running requests");
        };
        let service = Service::new(Arc::new(manager));
        let service = SnapshotsServer::with_interceptor(service, refuse_other_users);
        Server::builder()
            .max_concurrent_streams(MAX_REQUESTS)
            .add_service(service)
            .serve_with_incoming_shutdown(UnixListenerStream::new(socket), ended)
            .await
            .map_err(|error| Error::failed("cannot serve the socket").because(error))
    })
}

/// Refuses requests of other users than that of this process, whatever the mode of a passed socket is.
fn refuse_other_users(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>();
    let user = peer.and_then(|peer| peer.peer_cred).map(|peer| peer.uid());
    match user {
        Some(user) if user == geteuid().as_raw() => Ok(request),
        _ => Err(Status::permission_denied("only root may use this socket")),
    }
}
