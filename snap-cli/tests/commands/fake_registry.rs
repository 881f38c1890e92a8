//! A registry whose answers a test determines, on a port of this machine, without TLS.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// A request that the registry has received.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    /// The headers, with their names in lower case.
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(own, _)| own == name);
        found.next().map(|(_, value)| value.as_str())
    }

    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Whether its length is declared.
    length: Length,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Declared,
    /// The connection is closed at the end.
    Unknown,
    /// The connection is closed after so many bytes.
    Cut(usize),
    /// The connection is closed without an answer.
    Nothing,
    /// The body is sent byte by byte, with pauses.
    Slow,
    /// The body is sent as a chunk, and trailers follow until the client closes the connection.
    Endless,
}

/// The pause between two bytes of a slow answer.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

impl Answer {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            length: Length::Declared,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Closes the connection after a part of the body.
    pub(crate) fn cut_after(mut self, bytes: usize) -> Self {
        self.length = Length::Cut(bytes);
        self
    }

    /// Closes the connection without an answer.
    pub(crate) fn nothing() -> Self {
        let mut answer = Self::new(500, "");
        answer.length = Length::Nothing;
        answer
    }

    /// Sends the body byte by byte.
    pub(crate) fn slow(mut self) -> Self {
        self.length = Length::Slow;
        self
    }

    /// Sends endless trailers after the body.
    pub(crate) fn endless(mut self) -> Self {
        self.length = Length::Endless;
        self
    }

    /// Does not declare the length of the body.
    pub(crate) fn without_length(mut self) -> Self {
        self.length = Length::Unknown;
        self
    }
}

type Panics = Arc<Mutex<Vec<Box<dyn std::any::Any + Send>>>>;

type Handler = dyn Fn(&Request) -> Answer + Send + Sync;

/// A running registry.
pub(crate) struct FakeRegistry {
    port: u16,
    stop: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<Request>>>,
    /// The panics of the handler, which fail the test.
    panics: Panics,
}

impl FakeRegistry {
    /// Starts a registry with these answers.
    pub(crate) fn start(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let handler: Arc<Handler> = Arc::new(handler);
        let panics = Panics::default();
        let (stopped, seen, failed) = (stop.clone(), requests.clone(), panics.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (handler, seen, failed) = (handler.clone(), seen.clone(), failed.clone());
                std::thread::spawn(move || {
                    let served = std::panic::catch_unwind(AssertUnwindSafe(|| {
                        serve(stream.unwrap(), &*handler, &seen);
                    }));
                    if let Err(panic) = served {
                        failed.lock().unwrap().push(panic);
                    }
                });
            }
        });
        Self {
            port,
            stop,
            requests,
            panics,
        }
    }

    /// Returns the host and the port.
    pub(crate) fn name(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Returns the requests, without the first one of each command.
    pub(crate) fn requests(&self) -> Vec<Request> {
        let all = self.requests.lock().unwrap().clone();
        all.into_iter().filter(|r| r.path != "/v2/").collect()
    }

    /// Returns the first lines of the requests, and forgets them.
    pub(crate) fn take_lines(&self) -> Vec<String> {
        let lines = self.requests().iter().map(Request::line).collect();
        self.requests.lock().unwrap().clear();
        lines
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // The thread waits for a connection.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        let panic = self.panics.lock().ok().and_then(|mut panics| panics.pop());
        if let Some(panic) = panic.filter(|_| !std::thread::panicking()) {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Answers the requests on a connection, one after the other.
fn serve(stream: TcpStream, handler: &Handler, seen: &Mutex<Vec<Request>>) {
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    // The first record of TLS may have no line break to wait for.
    if reader
        .fill_buf()
        .map_or(true, |data| data.first() == Some(&0x16))
    {
        return;
    }
    while let Some(request) = receive(&mut reader) {
        seen.lock().unwrap().push(request.clone());
        let answer = handler(&request);
        if answer.length == Length::Nothing {
            return;
        }
        let mut head = format!("HTTP/1.1 {} Answer\r\n", answer.status);
        if answer.length == Length::Endless {
            head.push_str("Transfer-Encoding: chunked\r\n");
        } else if answer.status != 204 && answer.length != Length::Unknown {
            head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
        }
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut data = head.into_bytes();
        let body = match answer.length {
            Length::Cut(bytes) => answer.body.get(..bytes).unwrap_or(&answer.body),
            Length::Declared | Length::Unknown => &answer.body,
            Length::Nothing | Length::Slow | Length::Endless => &[][..],
        };
        if request.method != "HEAD" {
            data.extend(body);
        }
        // The client may have closed the connection.
        if writer.write_all(&data).is_err() {
            return;
        }
        if answer.length == Length::Endless {
            let size = format!("{:x}\r\n", answer.body.len());
            let mut part = [size.as_bytes(), &answer.body, b"\r\n0\r\n"].concat();
            while writer.write_all(&part).is_ok() {
                part = b"X-More: more\r\n".repeat(100);
            }
            return;
        }
        if answer.length == Length::Slow {
            for byte in &answer.body {
                if writer.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(PAUSE);
            }
        } else if answer.length != Length::Declared {
            return;
        }
    }
}

/// Receives a request; `None` at the end of the connection, or if it is not HTTP, such as the start of TLS.
fn receive(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).ok()?;
    let line = String::from_utf8(line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    words.next().filter(|version| *version == "HTTP/1.1")?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = headers.iter().find(|(name, _)| name == "content-length");
    let length = length.map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        method,
        path,
        headers,
        body,
    })
}
