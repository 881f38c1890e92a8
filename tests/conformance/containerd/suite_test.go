// Runs containerd's own test suite for snapshotters on cowl-snapshotter.
//
// COWL_SNAPSHOTTER_BIN names the program under test. The tests run as root, with Debian's package
// golang-github-containerd-containerd-dev.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func TestSnapshotter(t *testing.T) {
	testsuite.SnapshotterSuite(t, "cowl", start)
}

// start starts the program with a store in the directory root. The returned function removes all snapshots and ends it.
func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	program := os.Getenv("COWL_SNAPSHOTTER_BIN")
	if program == "" {
		return nil, nil, errors.New("COWL_SNAPSHOTTER_BIN is not set")
	}
	socket := filepath.Join(root, "socket")
	server := exec.Command(program, "--store", filepath.Join(root, "store"), "--address", socket)
	server.Stdout, server.Stderr = os.Stdout, os.Stderr
	// The suite creates the directory with a mode that the program refuses.
	if err := os.Chmod(root, 0700); err != nil {
		return nil, nil, err
	}
	if err := server.Start(); err != nil {
		return nil, nil, err
	}
	if err := waitFor(socket); err != nil {
		return nil, nil, err
	}
	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		return nil, nil, err
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "cowl")
	cleanup := func() error {
		removed := removeAll(ctx, snapshotter)
		connection.Close()
		if err := server.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		if err := server.Wait(); err != nil {
			return err
		}
		return removed
	}
	return snapshotter, cleanup, nil
}

func waitFor(socket string) error {
	for i := 0; i < 1000; i++ {
		connection, err := net.Dial("unix", socket)
		if err == nil {
			return connection.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("nothing listens at %s", socket)
}

// removeAll removes all snapshots, children first, so that no mount remains.
func removeAll(ctx context.Context, snapshotter snapshots.Snapshotter) error {
	for {
		parents, all := map[string]bool{}, []string{}
		err := snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			parents[info.Parent] = true
			all = append(all, info.Name)
			return nil
		})
		if err != nil {
			return err
		}
		if len(all) == 0 {
			return snapshotter.(snapshots.Cleaner).Cleanup(ctx)
		}
		for _, name := range all {
			if !parents[name] {
				if err := snapshotter.Remove(ctx, name); err != nil {
					return err
				}
			}
		}
	}
}
